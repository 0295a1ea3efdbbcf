"""Beam search of a Transformer-base with random weights, over a padded batch of real sentences: the scores of
the best of each."""

from pathlib import Path

import pytest
import torch

import warpformer as wf
from warpformer.bench.encoder import REST_SECONDS, batch_of
from warpformer.bench.sentence_encoder import TEST_SET, read_sentences

SENTENCES, BEAMS, NEW = 32, 4, 16
START = 2  # BART's decoder begins with </s>
SHAPE = dict(
    vocab_size=32000,
    d_model=512,
    encoder_layers=6,
    decoder_layers=6,
    encoder_ffn_dim=2048,
    decoder_ffn_dim=2048,
    encoder_attention_heads=8,
    decoder_attention_heads=8,
    max_position_embeddings=512,
    init_std=0.06,  # so that some tokens are likelier than others
    forced_eos_token_id=None,
)


@pytest.mark.parametrize("mode", [None, "int8_dynamic"])
def bench_beam_search(compare, peer, data, tmp_path, mode):
    from transformers import BartConfig, BartForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough
    torch.manual_seed(0)
    with torch.inference_mode(False):
        theirs = BartForConditionalGeneration(BartConfig(**SHAPE)).eval()
    theirs.save_pretrained(tmp_path)
    # The output layer too, though its weight is that of the embedding: as CTranslate2 has it.
    model = wf.load(tmp_path, quantization=mode and {"mode": mode, "tied": True})
    ids, mask = batch_of(read_sentences(Path(data) if data else TEST_SET)[:SENTENCES])
    lengths = dict(min_new_tokens=NEW, max_new_tokens=NEW)

    def ours():
        found = model.generate(ids, mask, num_beams=BEAMS, return_dict_in_generate=True, **lengths)
        return found.sequences_scores

    peers = {}
    if ctranslate2 := peer("ctranslate2"):
        compute_type = "int8" if mode else "float32"
        translator = ctranslate2.Translator(theirs, compute_type, START)
        rows = [row[:n].tolist() for row, n in zip(ids, mask.sum(1), strict=True)]
        peers[f"ctranslate2 {compute_type}"] = lambda: translator(rows, BEAMS, NEW)
    moved, flops = cost(theirs, mask)
    compare(
        f"Transformer-base, {SENTENCES} sentences, {NEW} tokens, {BEAMS} beams"
        + (f", {mode}" if mode else ""),
        dtype=torch.float32,
        inputs=tuple,
        ours=ours,
        peers=peers,
        moved=moved // 4 if mode else moved,
        flops=flops,
        compute="int8" if mode else "f32",
        rest=REST_SECONDS if ctranslate2 else 0,
        tolerance=0.05 if mode else 1e-4,
    )


def cost(model, mask):
    """(bytes, operations): matrices of the encoder once, those of the decoder and the vocabulary for each
    token; their products."""
    sizes = {
        part: sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
        for part, layers in (("encoder", model.model.encoder), ("decoder", model.model.decoder))
    }
    head = model.lm_head.weight.numel()
    read = int(mask.sum())
    written = SENTENCES * BEAMS * NEW
    return (
        4 * (sizes["encoder"] + NEW * (sizes["decoder"] + head)),
        2 * (read * sizes["encoder"] + written * (sizes["decoder"] + head)),
    )
