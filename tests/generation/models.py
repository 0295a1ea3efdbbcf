"""Random tiny checkpoints, and transformers' tokens for them."""

from contextlib import contextmanager

import torch
import transformers

import warpformer as wf
from tests.models.checkpoints import DECODERS, SEQ2SEQ, padded_batch, random_model

CLASSES = {"GPT2": "GPT2LMHeadModel", "Marian": "MarianMTModel"}
NEW = 14
EOS = [5, 14, 15, 18, 61, 85, 96]  # so many that rows of random models end
PADDING = 1
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": PADDING}


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


def new_tokens(model, ids, mask, **options):
    """Ours [R, new], behind the prompt."""
    found = wf.generate(model, ids, mask, **OPTIONS | options)
    if hasattr(model, "encode"):
        return found[:, 1:]
    prompt = ids.repeat_interleave(options.get("num_return_sequences", 1), 0)
    assert torch.equal(found[:, : ids.shape[1]], prompt)
    return found[:, ids.shape[1] :]


@torch.no_grad()
def expected(model, ids, mask, **options):
    """Transformers' new tokens [R, new] of each row alone."""
    options = {"do_sample": False} | OPTIONS | options
    rows = []
    for row, kept in enumerate(mask.bool()):
        alone = ids[row, kept][None]
        out = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        rows += [*out[:, 1 if model.config.is_encoder_decoder else alone.shape[1] :]]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)


@contextmanager
def counted(model):
    """The positional arguments of each call of a model."""
    calls = []
    hook = model.register_forward_pre_hook(lambda module, args: calls.append(args))
    yield calls
    hook.remove()
