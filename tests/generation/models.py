"""Random tiny checkpoints, and transformers' tokens for them."""

import torch
import transformers

import warpformer as wf
from tests.models.checkpoints import DECODERS, SEQ2SEQ, padded_batch, random_model

CLASSES = {"GPT2": "GPT2LMHeadModel", "Marian": "MarianMTModel"}
NEW = 14
EOS = [5, 11, 17, 23, 31, 47, 61]  # so many that rows of random models end
PADDING = 0


def make(name, folder):
    """(ours, transformers') of one architecture."""
    architecture, config = (DECODERS | SEQ2SEQ)[name]
    kind = "ForConditionalGeneration" if name in SEQ2SEQ else "ForCausalLM"
    cls = getattr(transformers, CLASSES.get(architecture, architecture + kind))
    theirs = random_model(cls, type(config).from_dict(config.to_dict()))
    theirs.save_pretrained(folder)
    return wf.load(folder), theirs


def prompts(name):
    ids, mask = padded_batch(15, 90)
    mask[1, 2] = mask[1, 0] = 0  # anywhere
    return ids, mask


@torch.no_grad()
def expected(model, ids, mask, **options):
    """Transformers' new tokens [B, new] of each row alone."""
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": EOS} | options
    options |= {"pad_token_id": PADDING, "forced_eos_token_id": None, "forced_bos_token_id": None}
    rows = []
    for row, kept in enumerate(mask.bool()):
        alone = ids[row, kept][None]
        out = model.generate(alone, attention_mask=torch.ones_like(alone), **options)[0]
        rows.append(out[1 if model.config.is_encoder_decoder else alone.shape[1] :])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
