"""The flash-attention package's functions give what ours give, and mean what theirs mean."""

import pytest
import torch

from tests.check import same_bits
from warpformer import InputError, ops

attention = ops.scaled_dot_product_attention


def qkv(queries, keys, dtype):
    q = torch.randn(2, queries, 6, 32, dtype=dtype)
    k, v = torch.randn(2, 2, keys, 2, 32, dtype=dtype)
    return q, k, v


def definition(q, k, v, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """Of the package's documentation, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(3, 1) for t in (k, v))
    s = (scale or q.shape[-1] ** -0.5) * q @ k.mT
    s = softcap * torch.tanh(s / softcap) if softcap else s
    away = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    if slopes is not None:
        s = s - slopes.double()[:, None, None] * away.abs()
    hidden = (away > 0) & causal
    hidden |= (away < -window[0]) & (window[0] >= 0) | (away > window[1]) & (window[1] >= 0)
    s = s.masked_fill(hidden, -torch.inf)
    return (torch.softmax(s, -1).nan_to_num(0.0) @ v).transpose(1, 2)


OPTIONS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (5, 2)}, {"window": (5, 2)}),
    "left window": ({"window_size": (5, -1), "causal": True}, {"window": (5, -1), "causal": True}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "softcap": ({"softcap": 2.0}, {"softcap": 2.0}),
    "slopes": ({"alibi_slopes": torch.linspace(0.1, 1, 6)}, {"slopes": torch.linspace(0.1, 1, 6)}),
}


def close(out, expected):
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 2e-3}[out.dtype]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("queries", [1, 20, 37])
def test_func(dtype, options, queries):
    theirs, meaning = OPTIONS[options]
    q, k, v = qkv(queries, 33, dtype)
    close(ops.flash_attn_func(q, k, v, **theirs), definition(q, k, v, **meaning))


@pytest.mark.parametrize("options", OPTIONS)
def test_varlen(dtype, options):
    lengths_q, lengths_k = [3, 0, 17, 1], [9, 4, 5, 33]
    starts = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k)]
    q, k, v = (t[0] for t in qkv(sum(lengths_k), sum(lengths_k), dtype))
    q = q[: sum(lengths_q)]
    theirs, meaning = OPTIONS[options]
    out = ops.flash_attn_varlen_func(q, k, v, *starts, 17, 33, **theirs)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    close(out, torch.cat([definition(*(t[None] for t in part), **meaning)[0] for part in parts]))


@pytest.mark.parametrize("options", OPTIONS)
def test_with_kvcache(dtype, options):
    theirs, meaning = OPTIONS[options]
    q, k, v = qkv(3, 33, dtype)
    for lengths in (None, 20, torch.tensor([20, 20], dtype=torch.int32)):
        used = 33 if lengths is None else 20
        out, lse = ops.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, return_softmax_lse=True, **theirs
        )
        close(out, definition(q, k[:, :used], v[:, :used], **meaning))
        assert lse.shape == (2, 6, 3)


@pytest.mark.parametrize("interleaved", [True, False])
def test_append_and_rotate(dtype, interleaved):
    q, key, value = qkv(3, 3, dtype)
    k, v = torch.randn(2, 2, 40, 2, 32, dtype=dtype)
    lengths = torch.tensor([5, 37], dtype=torch.int32)
    cos, sin = ops.rope_tables(ops.rope_frequencies(16)[0], 40)
    caches = k.clone(), v.clone()
    out = ops.flash_attn_with_kvcache(
        q, *caches, key, value, cos, sin, lengths, causal=True, rotary_interleaved=interleaved
    )
    positions = lengths[:, None] + torch.arange(3)
    q, key = ops.rope(q, cos, sin, key=key, positions=positions, interleaved=interleaved)
    for b, n in enumerate(lengths.tolist()):
        k[b, n : n + 3], v[b, n : n + 3] = key[b], value[b]
    assert same_bits(caches[0], k)
    assert same_bits(caches[1], v)
    assert same_bits(out, ops.cached_attention(q, k, v, lengths + 3))


def test_paged_cache(dtype):
    q, k, v = qkv(3, 32, dtype)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    blocks = [torch.empty(4, 16, 2, 32, dtype=dtype) for _ in range(2)]
    for cache, paged in ((k, blocks[0]), (v, blocks[1])):
        paged[table.flatten()] = cache.reshape(4, 16, 2, 32)
    out = ops.flash_attn_with_kvcache(q, *blocks, block_table=table, causal=True)
    assert same_bits(out, ops.flash_attn_with_kvcache(q, k, v, causal=True))


def test_rows_of_a_cache(dtype):
    q, key, value = qkv(3, 3, dtype)
    k, v = torch.randn(2, 5, 40, 2, 32, dtype=dtype)
    rows, lengths = torch.tensor([4, 1], dtype=torch.int32), torch.tensor([5, 37], dtype=torch.int32)
    own = k[rows], v[rows]
    untouched = k[[0, 2, 3]]
    out = ops.flash_attn_with_kvcache(q, k, v, key, value, cache_seqlens=lengths, cache_batch_idx=rows)
    assert same_bits(out, ops.flash_attn_with_kvcache(q, *own, key, value, cache_seqlens=lengths))
    assert same_bits(k[rows], own[0])
    assert same_bits(v[rows], own[1])
    assert same_bits(k[[0, 2, 3]], untouched)


def test_gradients():
    q, k, v = (t.requires_grad_() for t in qkv(20, 33, torch.float32))
    out = ops.flash_attn_func(q, k, v, causal=True)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(definition(q, k, v, causal=True), (q, k, v), grad.double())
    for own, other in zip(torch.autograd.grad(out, (q, k, v), grad), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_refused():
    q, k, v = qkv(3, 33, torch.float32)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    refused = {
        "flash_attn_func: dropout_p = 0.1": lambda: ops.flash_attn_func(q, k, v, 0.1),
        "flash_attn_func: return_attn_probs": lambda: ops.flash_attn_func(q, k, v, return_attn_probs=True),
        "flash_attn_varlen_func: block_table": lambda: ops.flash_attn_varlen_func(
            q[0], k[0], v[0], starts, starts, block_table=starts
        ),
        "flash_attn_with_kvcache: cache_batch_idx": lambda: ops.flash_attn_with_kvcache(
            q, k, v, cache_batch_idx=starts, block_table=starts[:, None]
        ),
        "flash_attn_with_kvcache: k and v": lambda: ops.flash_attn_with_kvcache(q, k, v, k),
        "flash_attn_with_kvcache: rotary_cos without k": lambda: ops.flash_attn_with_kvcache(
            q, k, v, rotary_cos=q, rotary_sin=q
        ),
    }
    for message, call in refused.items():
        with pytest.raises(InputError, match=f"^{message}"):
            call()
