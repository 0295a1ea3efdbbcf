"""Dropout in scaled_dot_product_attention, forward and backward."""

import pytest
import torch

from tests.check import check, check_gradients, same_bits, threads
from tests.ops.test_scaled_dot_product_attention import qkv, starts
from warpformer import InputError, ops

OP = "scaled_dot_product_attention"
attention = ops.scaled_dot_product_attention
SHAPES = [(2, 4, 61, 93, 24, 40), (1, 4, 150, 300, 64, 64), (1, 4, 130, 40, 33, 17)]


def factors(batch, heads, queries, keys, **options):
    """What the weights are multiplied by: the output where the keys' values are the unit vectors, beside that
    without dropout."""
    q, k = torch.zeros(batch, heads, queries, 1), torch.zeros(batch, heads, keys, 1)
    values = torch.eye(keys).expand(batch, heads, keys, keys)
    dropped = attention(q, k, values, scale=1.0, **options)
    return (dropped * keys).double()


def reference(kept):
    """Attention with these factors, in float32 at least."""

    def function(q, k, v):
        dtype = q.dtype
        q, k, v = (t.double() if dtype is torch.float64 else t.float() for t in (q, k, v))
        s = q @ k.mT / q.shape[-1] ** 0.5
        weights = torch.exp(s - torch.logsumexp(s, -1, keepdim=True))
        return ((weights * kept.to(weights.dtype)) @ v).to(dtype)

    return function


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_factors(device, p):
    kept = factors(2, 3, 40, 300, dropout_p=p, seed=3)
    dropped = kept == 0
    torch.testing.assert_close(
        kept[~dropped], torch.full_like(kept[~dropped], 1 / (1 - p)), rtol=1e-5, atol=0
    )
    share = (p * (1 - p) / 40 / 300) ** 0.5  # standard deviation of a head's
    assert ((dropped.double().mean((-1, -2)) - p).abs() < 5 * share).all()
    flat = dropped.flatten(0, 1)
    assert not any(torch.equal(flat[i], flat[j]) for i in range(6) for j in range(i))
    assert not any(torch.equal(flat[0, i], flat[0, j]) for i in range(40) for j in range(i))


def test_factors_are_words_of_philox(device):
    """A head's first query draws what ops.dropout draws of the first elements."""
    ones = torch.ones(300)
    assert torch.equal(factors(1, 1, 1, 300, dropout_p=0.3, seed=17)[0, 0, 0] == 0,
                       ops.dropout(ones, 0.3, seed=17) == 0)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device, dtype, shape):
    kept = factors(*shape[:4], dropout_p=0.3, seed=5)

    def ours(q, k, v):
        return attention(q, k, v, dropout_p=0.3, seed=5)

    inputs = qkv(*shape, dtype)
    check(ours, reference(kept), *inputs)
    check_gradients(ours, reference(kept), *inputs)


def test_seeds(device):
    q, k, v = qkv(1, 2, 20, 30, 8, 8)

    def draw(seed=None):
        return attention(q, k, v, dropout_p=0.5, seed=seed)

    assert same_bits(draw(5), draw(torch.tensor(5)))
    assert not same_bits(draw(5), draw(6))
    torch.manual_seed(3)
    first = draw()
    assert not same_bits(first, draw())
    torch.manual_seed(3)
    assert same_bits(first, draw())


def test_lse_is_that_without_dropout(device):
    inputs = qkv(1, 2, 20, 300, 8, 8)
    _, lse = attention(*inputs, dropout_p=0.5, seed=1, return_lse=True)
    assert same_bits(lse, attention(*inputs, return_lse=True)[1])


def test_all_and_nothing(device, dtype):
    inputs = [t.requires_grad_() for t in qkv(1, 2, 20, 300, 8, 8, dtype)]
    assert same_bits(attention(*inputs, dropout_p=0.0, seed=1), attention(*inputs))
    out = attention(*inputs, dropout_p=1.0)
    assert not out.any()
    assert not any(t.any() for t in torch.autograd.grad(out, inputs, torch.ones_like(out)))


def test_packed_sequences(device):
    """The mask of a sequence is that of its place in a batch, whatever the lengths."""
    lengths = (40, 0, 300, 17)
    q, k, v = (torch.randn(sum(lengths), 2, 24) for _ in range(3))
    options = {"dropout_p": 0.4, "seed": 9, "is_causal": True}
    out = attention(q, k, v, cu_seqlens_q=starts(lengths), cu_seqlens_k=starts(lengths), **options)
    for i, parts in enumerate(zip(*(t.split(lengths) for t in (q, k, v)), out.split(lengths), strict=True)):
        *inputs, own = (t.transpose(0, 1) for t in parts)
        alone = attention(*(t.expand(i + 1, *t.shape) for t in inputs), **options)[i]
        assert same_bits(own, alone)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_same_bits_for_any_number_of_threads(device, dtype, kv_heads):
    leaves = [t.requires_grad_() for t in qkv(1, 4, 200, 700, 24, 24, dtype, kv_heads)]
    grad = torch.randn(1, 4, 200, 24, dtype=dtype)
    found = []
    for count in (1, 2, 4):
        with threads(count):
            out = attention(*leaves, dropout_p=0.3, seed=1, is_causal=True, enable_gqa=True)
            found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_refuses_what_is_no_probability(device, p):
    with pytest.raises(InputError, match=r"^scaled_dot_product_attention: .*dropout_p"):
        attention(*qkv(1, 2, 3, 4, 8, 8), dropout_p=p)


def test_refuses_what_is_no_seed(device):
    inputs = qkv(1, 2, 3, 4, 8, 8)
    with pytest.raises(TypeError, match=r"^scaled_dot_product_attention: seed"):
        attention(*inputs, dropout_p=0.5, seed=1.5)
    with pytest.raises(InputError, match=r"^scaled_dot_product_attention: seed"):
        attention(*inputs, dropout_p=0.5, seed=2**63)
    with pytest.raises(InputError, match=r"^scaled_dot_product_attention: .*seed = i64.2."):
        attention(*inputs, dropout_p=0.5, seed=torch.tensor([1, 2]))
