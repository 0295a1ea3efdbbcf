from pathlib import Path

import pytest

from warpformer.training import Texts, read_texts, train_tokenizer

VERSES = Path(__file__).parents[2] / "examples/data/bible.en-es.valid.tsv"


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
