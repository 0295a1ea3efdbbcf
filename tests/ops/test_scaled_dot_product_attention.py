import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import ops

attention = ops.scaled_dot_product_attention

SHAPES = [  # batch, heads, queries, keys, width, value width
    (2, 4, 37, 53, 16, 16),
    (1, 3, 31, 300, 33, 47),  # two blocks of keys, tails everywhere
    (1, 1, 65, 17, 64, 65),
    (2, 2, 200, 256, 8, 8),  # two blocks of queries
    (1, 2, 40, 257, 300, 80),  # the width exceeds one stretch of the product
    (1, 2, 31, 600, 256, 100),
    (1, 5, 1000, 1, 1, 1),
]


def qkv(b, h, t, s, d, dv, dtype=torch.float32, kv_heads=None):
    g = kv_heads or h
    return (
        torch.randn(b, h, t, d, dtype=dtype),
        torch.randn(b, g, s, d, dtype=dtype),
        torch.randn(b, g, s, dv, dtype=dtype),
    )


def mask_of(kind, b, h, t, s):
    if kind == "padding":
        mask = torch.rand(b, 1, 1, s) > 0.3
    elif kind == "bool":
        mask = torch.rand(t, s) > 0.3
    else:
        return torch.randn(1, h, 1, s) if kind == "bias" else torch.randn(b, 1, t, s)
    return mask.index_fill_(-1, torch.tensor(0), True)  # every query sees a key: torch gives NaN else


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_values(device, dtype, shape, causal):
    check(
        lambda *qkv: attention(*qkv, is_causal=causal),
        lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=causal),
        *qkv(*shape, dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["padding", "bool", "bias", "float"])
def test_mask(device, dtype, shape, kind):
    mask = mask_of(kind, *shape[:4])
    mask = mask if mask.dtype is torch.bool else mask.to(dtype)
    check(attention, F.scaled_dot_product_attention, *qkv(*shape, dtype), mask)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, -0.3])
def test_scale(device, dtype, scale):
    check(
        lambda *qkv: attention(*qkv, scale=scale),
        lambda *qkv: F.scaled_dot_product_attention(*qkv, scale=scale),
        *qkv(2, 4, 37, 53, 16, 16, dtype),
    )


def test_mask_and_causal_together(device, dtype):
    def reference(q, k, v, mask):
        see = torch.ones(37, 53, dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, k, v, mask.masked_fill(~see, -torch.inf))

    mask = torch.randn(37, 53, dtype=dtype)
    inputs = (*qkv(2, 4, 37, 53, 16, 16, dtype), mask)
    check(lambda *inputs: attention(*inputs, is_causal=True), reference, *inputs)


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_shared_key_heads(device, dtype, kv_heads):
    check(
        lambda *qkv: attention(*qkv, enable_gqa=True),
        lambda *qkv: F.scaled_dot_product_attention(*qkv, enable_gqa=True),
        *qkv(2, 6, 37, 40, 16, 16, dtype, kv_heads),
    )


@pytest.mark.parametrize("dims", [2, 3, 5])
def test_leading_dimensions(device, dtype, dims):
    q, k, v = (t[(0,) * max(0, 4 - dims)] for t in qkv(2, 3, 9, 10, 16, 17, dtype))
    if dims == 5:
        q, k, v = (t.view(1, 2, *t.shape[1:]) for t in (q, k, v))
    out = attention(q, k, v)
    assert out.shape == F.scaled_dot_product_attention(q, k, v).shape
    four = (t.view(-1, *t.shape[-3:]) if dims == 5 else t[(None,) * (4 - dims)] for t in (q, k, v))
    assert same_bits(out, attention(*four).view(out.shape))


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257])
@pytest.mark.parametrize("which", ["queries", "keys", "width", "value_width"])
def test_sizes(device, size, which):
    """Each dimension alone at each size, against a batch of one head and few rows."""
    sizes = {"queries": 3, "keys": 5, "width": 7, "value_width": 9} | {which: size}
    q, k, v = qkv(1, 2, *sizes.values())
    weights = torch.softmax(q.double() @ k.double().mT / max(sizes["width"], 1) ** 0.5, -1)
    expected = (weights @ v.double()).float()
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


LENGTHS = [(5, 5), (0, 3), (300, 300), (4, 0), (1, 17), (0, 0), (200, 20)]  # queries, keys


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences(device, dtype, causal):
    """Bit by bit what each sequence gives alone."""
    lengths_q, lengths_k = zip(*LENGTHS, strict=True)
    q = torch.randn(sum(lengths_q), 4, 24, dtype=dtype)
    k = torch.randn(sum(lengths_k), 2, 24, dtype=dtype)
    v = torch.randn(sum(lengths_k), 2, 40, dtype=dtype)
    options = {"is_causal": causal, "enable_gqa": True}
    cu_seqlens = {"cu_seqlens_q": starts(lengths_q), "cu_seqlens_k": starts(lengths_k)}
    out = attention(q, k, v, **cu_seqlens, **options)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [attention(*(t.transpose(0, 1) for t in part), **options).transpose(0, 1) for part in parts]
    assert same_bits(out, torch.cat(alone))


@pytest.mark.parametrize("length", [1, 10, 250, 300])
@pytest.mark.parametrize("garbage", [0.0, torch.nan, torch.inf])
def test_padded_sequence(device, dtype, length, garbage):
    """Bit by bit what it gives alone, whatever the padding holds."""
    q, k, v = qkv(3, 2, 40, 530, 24, 40, dtype)
    keep = torch.ones(3, 1, 1, 530, dtype=torch.bool)
    keep[1, ..., length:] = False
    for t in (k, v):
        t[1, :, length:] = garbage
    out = attention(q, k, v, keep)
    assert same_bits(out[1:2], attention(q[1:2], k[1:2, :, :length], v[1:2, :, :length]))
    assert same_bits(out[0], attention(q[0], k[0], v[0]))


@pytest.mark.parametrize("operand", ["key", "value"])
@pytest.mark.parametrize("how", ["bool", "float", "causal"])
@pytest.mark.parametrize("keys", [40, 300])
def test_what_is_masked_does_not_leak(device, dtype, operand, how, keys):
    queries, half = 40, 20
    q, k, v = qkv(3, 2, queries, keys, 24, 24, dtype)
    see = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    see[:, 1] = False
    additive = torch.zeros(queries, keys).masked_fill(~see, -torch.inf)
    options = {"attn_mask": see if how == "bool" else additive, "is_causal": how == "causal"}
    options["alignment"] = "bottom-right"
    clean = attention(q, k, v, **options)
    assert clean.isfinite().all()

    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)[:, None, None]
    hidden = k if operand == "key" else v
    hidden[:, :, 1] = garbage
    hidden[:, :, half - queries] = garbage
    out = attention(q, k, v, **options)
    assert same_bits(out[:, :, :half], clean[:, :, :half])
    assert not out[:, :, half:].isfinite().flatten(1).all(1).any()  # those do see it


@pytest.mark.parametrize("how", ["bool", "float"])
@pytest.mark.parametrize("garbage", [0.0, torch.nan])
def test_fully_masked_rows_are_zero(device, dtype, how, garbage):
    q, k, v = qkv(1, 2, 20, 300, 24, 24, dtype)
    see = torch.rand(20, 300) > 0.5
    see[3] = see[19] = False
    mask = see if how == "bool" else torch.zeros(20, 300).masked_fill(~see, -torch.inf)
    clean = attention(q, k, v, mask)
    q[:, :, 3] = q[:, :, 19] = garbage
    out = attention(q, k, v, mask)
    assert same_bits(out, clean)
    assert same_bits(out[:, :, [3, 19]], torch.zeros(1, 2, 2, 24, dtype=dtype))


def test_scores_beyond_the_range_of_exp(device, dtype):
    q, k, v = qkv(4, 8, 256, 300, 32, 40, dtype)  # many rows: only those with a near tie have an error at all
    assert (60 * q @ (60 * k).mT).abs().max() / 32**0.5 > 1e4
    check(attention, F.scaled_dot_product_attention, 60 * q, 60 * k, v)


def test_large_finite_masks(device, dtype):
    """The lowest finite number as a mask, as Hugging Face models have it."""
    q, k, v = qkv(1, 2, 64, 300, 32, 40, dtype)
    mask = torch.zeros(64, 300, dtype=dtype).masked_fill(torch.rand(64, 300) > 0.5, torch.finfo(dtype).min)
    check(attention, F.scaled_dot_product_attention, q, k, v, mask)
