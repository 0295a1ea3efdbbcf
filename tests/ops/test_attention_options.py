"""What scaled_dot_product_attention has beyond torch's: every option forward and backward, and lse."""

import math

import pytest
import torch

from tests.check import check, check_gradients, same_bits
from tests.ops.test_scaled_dot_product_attention import mask_of, qkv, starts
from warpformer import ops

OP = "scaled_dot_product_attention"
attention = ops.scaled_dot_product_attention

OPTIONS = {
    "causal": {"is_causal": True},
    "bottom-right": {"is_causal": True, "alignment": "bottom-right"},
    "window": {"window": (20, 3)},
    "causal window": {"is_causal": True, "window": (64, None), "alignment": "bottom-right"},
    "softcap": {"softcap": 2.0, "is_causal": True},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.125, 0.0625], "alignment": "bottom-right"},
    "negative scale": {"scale": -0.3},
    "no scale": {"scale": 0.0},
}
DIFFERENTIABLE = {name: options for name, options in OPTIONS.items() if name != "no scale"}
SHAPES = [(2, 4, 61, 93, 24, 40), (1, 4, 150, 300, 64, 64), (1, 4, 130, 40, 33, 17)]


@pytest.fixture
def options(request, device):
    """One of them, with tensors on the device."""
    return {name: torch.tensor(v) if name == "alibi_slopes" else v for name, v in request.param.items()}


def reference(q, k, v, mask=None, sinks=None, *, is_causal=False, alignment="top-left", window=(None, None),
              softcap=0.0, alibi_slopes=None, scale=None):  # fmt: skip
    """Every option spelled out, in float32 at least; (out, lse)."""
    dtype = q.dtype
    q, k, v = (t.double() if dtype is torch.float64 else t.float() for t in (q, k, v))
    heads, queries, keys = q.shape[-3], q.shape[-2], k.shape[-2]
    k, v = (t.repeat_interleave(heads // t.shape[-3], -3) for t in (k, v))
    s = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    own = torch.arange(queries)[:, None] + (keys - queries if alignment == "bottom-right" else 0)
    distance = torch.arange(keys) - own
    if alibi_slopes is not None:
        s = s - alibi_slopes[:, None, None].to(s.dtype) * distance.abs()
    left, right = window
    right = min(0, right or 0) if is_causal else right
    seen = torch.ones(queries, keys, dtype=torch.bool)
    seen &= distance >= -left if left is not None else seen
    seen &= distance <= right if right is not None else seen
    if mask is not None and mask.dtype is torch.bool:
        seen = seen & mask
    elif mask is not None:
        s = s + mask.to(s.dtype)
    s = s.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks[:, None, None].to(s.dtype).expand(*s.shape[:-1], 1)
        lse = torch.logsumexp(torch.cat([s, sink], -1), -1)
    else:
        lse = torch.logsumexp(s, -1)
    lse = torch.where(seen.any(-1), lse, -torch.inf)
    weights = torch.exp(s - torch.where(lse.isneginf(), 0.0, lse)[..., None])
    return (weights @ v).to(dtype), lse.float() if dtype is not torch.float64 else lse


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS, indirect=True)
def test_values(device, dtype, shape, options):
    inputs = qkv(*shape, dtype)
    check(lambda *t: attention(*t, **options), lambda *t: reference(*t, **options)[0], *inputs)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS, indirect=True)
def test_lse(device, options):
    inputs = qkv(1, 4, 150, 300, 24, 24)
    out, lse = attention(*inputs, **options, return_lse=True)
    assert same_bits(out, attention(*inputs, **options))
    expected = reference(*(t.double() for t in inputs), **options)[1]
    assert lse.dtype is torch.float32
    torch.testing.assert_close(lse, expected.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, *DIFFERENTIABLE.values()], ids=["plain", *DIFFERENTIABLE], indirect=True
)
def test_gradients(device, dtype, shape, options):
    inputs = qkv(*shape, dtype)
    check_gradients(lambda *t: attention(*t, **options), lambda *t: reference(*t, **options)[0], *inputs)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_of_shared_heads(device, dtype, kv_heads):
    check_gradients(
        lambda *t: attention(*t, is_causal=True, enable_gqa=True),
        lambda *t: reference(*t, is_causal=True)[0],
        *qkv(2, 4, 61, 93, 24, 40, dtype, kv_heads),
    )


@pytest.mark.parametrize("kind", ["padding", "bool", "bias", "float"])
def test_gradients_with_a_mask(device, dtype, kind):
    """And that of an additive mask, summed over what was broadcast."""
    mask = mask_of(kind, 2, 4, 61, 93)
    mask = mask if mask.dtype is torch.bool else mask.to(dtype)
    check_gradients(attention, lambda *t: reference(*t)[0], *qkv(2, 4, 61, 93, 24, 40, dtype), mask)


def test_gradients_of_sinks_and_lse(device):
    sinks = torch.randn(64)  # as many as are judged after few draws
    inputs = (*qkv(1, 64, 17, 30, 24, 40), sinks)

    def ours(q, k, v, sinks):
        return attention(q, k, v, is_causal=True, sinks=sinks, return_lse=True)

    def truth(q, k, v, sinks):
        return reference(q, k, v, sinks=sinks, is_causal=True)

    check_gradients(ours, truth, *inputs)
    torch.testing.assert_close(ours(*inputs), truth(*inputs))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_packed_sequences(device, dtype, causal):
    """Bit by bit what each sequence gives alone."""
    lengths_q, lengths_k = (5, 0, 300, 4, 1, 0, 200), (5, 3, 300, 0, 17, 0, 20)
    q = torch.randn(sum(lengths_q), 4, 24, dtype=dtype).requires_grad_()
    k = torch.randn(sum(lengths_k), 2, 24, dtype=dtype).requires_grad_()
    v = torch.randn(sum(lengths_k), 2, 40, dtype=dtype).requires_grad_()
    options = {"is_causal": causal, "enable_gqa": True, "alignment": "bottom-right"}
    cu_seqlens = {"cu_seqlens_q": starts(lengths_q), "cu_seqlens_k": starts(lengths_k)}
    out, lse = attention(q, k, v, **cu_seqlens, **options, return_lse=True)
    grad = torch.randn_like(out)
    packed = torch.autograd.grad(out, (q, k, v), grad)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [attention(*(t.transpose(0, 1) for t in p), **options, return_lse=True) for p in parts]
    assert same_bits(lse, torch.cat([lse for _, lse in alone], 1))
    single = torch.autograd.grad(torch.cat([out.transpose(0, 1) for out, _ in alone]), (q, k, v), grad)
    for a, b in zip(packed, single, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_nothing_unseen_reaches_a_gradient(device, dtype, garbage):
    """Neither padding of any content nor the query of a fully masked row, whose gradient is 0."""
    q, k, v = qkv(2, 2, 40, 300, 24, 24, dtype)
    keep = torch.ones(2, 1, 40, 300, dtype=torch.bool)
    keep[1, ..., 250:] = False
    keep[:, :, 3] = False
    grad = torch.randn(2, 2, 40, 24, dtype=dtype)

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(attention(*leaves, keep), leaves, grad)

    clean = gradients()
    assert all(t.isfinite().all() for t in clean)
    assert not clean[0][:, :, 3].any()
    k[1, :, 250:] = v[1, :, 250:] = garbage
    q[:, :, 3] = garbage
    for a, b in zip(gradients(), clean, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (1, 1), (63, 64), (64, 65), (127, 63)], ids=str)
def test_small_sizes(device, sizes):
    q, k, v = qkv(1, 2, *sizes, 8, 8)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    found = torch.autograd.grad(attention(*leaves, is_causal=True).sum(), leaves)
    expected = torch.autograd.grad(reference(*leaves, is_causal=True)[0].sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_same_gradients_for_any_number_of_threads(device, dtype):
    leaves = [t.requires_grad_() for t in qkv(2, 4, 200, 300, 24, 24, dtype, 2)]
    grad = torch.randn(2, 4, 200, 24, dtype=dtype)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(torch.autograd.grad(attention(*leaves, enable_gqa=True), leaves, grad))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_gradients_without_scale(device, dtype):
    """Every weight is the same: no gradient reaches query and key."""
    leaves = [t.requires_grad_() for t in qkv(1, 2, 30, 300, 24, 24, dtype)]
    out = attention(*leaves, scale=0.0)
    dq, dk, dv = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert not dq.any()
    assert not dk.any()
    torch.testing.assert_close(dv, torch.full_like(dv, 30 / 300))
