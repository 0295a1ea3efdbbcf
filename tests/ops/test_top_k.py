import pytest
import torch

from tests.check import same_bits
from warpformer import ops


def expected(scores, k):
    values, indices = scores.float().sort(dim=-1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def check(scores, k):
    for found, right in zip(ops.top_k(scores, k), expected(scores, k), strict=True):
        assert same_bits(found, right)


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1000, 5000])
@pytest.mark.parametrize("k", [1, 8, 79, 1000])  # of more than there are blocks, too
def test_values_and_places(device, dtype, vocabulary, k):
    check(torch.randn(5, vocabulary, device=device).to(dtype), min(k, vocabulary))


def test_equal_scores_in_their_order(device):
    check(torch.randint(3, (4, 700), device=device).float(), 300)
    check(torch.zeros(2, 200, device=device), 200)


@pytest.mark.parametrize("other", [-torch.inf, torch.inf, torch.nan])
def test_what_is_not_finite(device, other):
    scores = torch.randn(3, 900, device=device)
    scores[0, ::7] = other
    scores[1] = other
    scores[1, 5] = 0
    check(scores, 200)


@pytest.mark.parametrize("vocabulary", [1, 65, 5000])
def test_log_softmax(device, dtype, vocabulary):
    scores = (4 * torch.randn(5, vocabulary, device=device)).to(dtype)
    values, indices = ops.top_k(scores, min(70, vocabulary), log_softmax=True)
    assert torch.equal(indices, ops.top_k(scores, min(70, vocabulary))[1])
    assert same_bits(values, ops.log_softmax(scores, dtype=torch.float32).gather(1, indices))


@pytest.mark.parametrize("other", [-torch.inf, torch.inf, torch.nan])
def test_log_softmax_of_what_is_not_finite(device, other):
    scores = torch.randn(3, 900, device=device)
    scores[0, ::7] = other
    scores[1] = other
    values, indices = ops.top_k(scores, 800, log_softmax=True)
    exact = dict(rtol=0, atol=0, equal_nan=True)  # of NaN not the sign
    torch.testing.assert_close(values, ops.log_softmax(scores).gather(1, indices), **exact)


def test_no_rows():
    values, indices = ops.top_k(torch.randn(0, 9), 4)
    assert values.shape == indices.shape == (0, 4)
