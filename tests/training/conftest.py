from pathlib import Path

import pytest
import torch

from warpformer.training import Texts, read_texts, train_tokenizer

VERSES = Path(__file__).parents[2] / "examples/data/bible.en-es.valid.tsv"


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Steps of models so small take ten times as long where two threads wait for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pairs():
    return read_texts(VERSES, [1, 2])


@pytest.fixture(scope="session")
def english():
    """In documents of 40 verses; the last one has 28."""
    texts = read_texts(VERSES, [1])
    documents = [range(i, min(i + 40, len(texts.rows))) for i in range(0, len(texts.rows), 40)]
    return Texts(texts.path, texts.rows, documents)


@pytest.fixture(scope="session")
def tokenizer(pairs):
    return train_tokenizer((text for row in pairs.rows for text in row), 600, sentinels=40)
