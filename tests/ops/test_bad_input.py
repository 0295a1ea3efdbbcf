"""What an op cannot take is an InputError that names the tensor and its shape, or a TypeError."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.samples import SAMPLES
from warpformer import _C, InputError, ops

x = torch.zeros(2, 3)
index = classes = torch.zeros(2, dtype=torch.int64)
half = torch.full((2,), 0.5, dtype=torch.float64)
packed = ops.pack_linear(torch.zeros(4, 3))
q, k, v = torch.zeros(3, 2, 4, 5, 8)
order, places, _ = ops.sort_by_expert(torch.zeros(2, 2, dtype=torch.int64), 3)
four = torch.zeros(4, 3)
attention = ops.scaled_dot_product_attention
tables = torch.zeros(2, 5, 4)


def starts(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def packed_attention(cu_seqlens_q, cu_seqlens_k):
    return attention(q[0], k[0], v[0], cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def int8(**changes):
    """A QuantizedWeight that is wrong in `changes` alone."""
    values, scales = torch.zeros(2, 3, dtype=torch.int8), torch.ones(2, 1)
    return ops.QuantizedWeight(values, scales, None, "int8", 3, 3)._replace(**changes)


cache, lengths = torch.zeros(2, 6, 2, 8), torch.zeros(2, dtype=torch.int32)
blocks = torch.zeros(1, dtype=torch.int64)


def cached(q=q, k=cache, v=cache, lengths=lengths, **options):
    return ops.cached_attention(q, k, v, lengths, **options)


def append(key=cache[:, :1], value=cache[:, :1], k=cache, v=cache, lengths=lengths, **options):
    return ops.append_to_cache_(key, value, k.clone(), v, lengths, **options)


SHAPES = {
    "softmax: dim = 2, x = f32[2,3]": lambda: ops.softmax(x, 2),
    "softmax: dim = -3, x = f32[2,3]": lambda: ops.softmax(x, -3),
    "softmax: mask = f32[2], x = f32[2,3]": lambda: ops.softmax(x, mask=x[:, 0]),
    "softmax: mask = f32[1,2,3], x = f32[2,3]": lambda: ops.softmax(x, mask=x[None]),
    "softmax: out = f32[3,2], x = f32[2,3]": lambda: ops.softmax(x, out=x.mT.contiguous()),
    "softmax: causal = true, dim = 0, x = f32[2,3]": lambda: ops.softmax(x, 0, is_causal=True),
    "softmax: causal = true, dim = -1, x = f32[3]": lambda: ops.softmax(x[0], is_causal=True),
    "cross_entropy: target = i64[3], x = f32[2,3]": lambda: ops.cross_entropy(x, classes.new_zeros(3)),
    "cross_entropy: target = i64[], x = f32[2,3]": lambda: ops.cross_entropy(x, classes[0]),
    "cross_entropy: weight = f32[2], x = f32[2,3]": lambda: ops.cross_entropy(x, classes, x[:, 0]),
    "cross_entropy: y = 3, target = i64[2]": lambda: ops.cross_entropy(x, classes + 3),
    'cross_entropy: reduction = "average"': lambda: ops.cross_entropy(x, classes, reduction="average"),
    "cross_entropy: smoothing = 1.1": lambda: ops.cross_entropy(x, classes, label_smoothing=1.1),
    "cross_entropy: loss = f32[1], target = i64[2]": lambda: ops.cross_entropy(x, classes, out=x[0, :1]),
    "cross_entropy: loss = f32[3], target = i64[2]": lambda: ops.cross_entropy(
        x, classes, reduction="none", out=x[0]
    ),
    "sample: scores = f32[3]": lambda: ops.sample(x[0]),
    "sample: scores = f32[2,0]": lambda: ops.sample(x[:, :0]),
    "sample: draws = i64[3], scores = f32[2,3]": lambda: ops.sample(x, half.new_zeros(3)),
    "sample: draws, float32, float64": lambda: ops.sample(x, x[:, 0]),
    "sample: temperature = -1": lambda: ops.sample(x, half, temperature=-1.0),
    "sample: top_k = -1": lambda: ops.sample(x, half, top_k=torch.tensor([0, -1])),
    "sample: top_p = 0": lambda: ops.sample(x, half, top_p=0.0),
    "sample: min_p = 1.5": lambda: ops.sample(x, half, min_p=1.5),
    "sample: typical_p = nan": lambda: ops.sample(x, half, typical_p=float("nan")),
    "sample: u = 1": lambda: ops.sample(x, half + 0.5),
    "sample: top_k = [3], 2 rows": lambda: ops.sample(x, half, top_k=classes.new_zeros(3)),
    "sample: tokens = i64[2], scores = f32[2,3]": lambda: ops.sample(x, tokens=classes, first_new=classes),
    "sample: tokens = i64[2,3], first_new = None": lambda: ops.sample(x, tokens=x.long(), repetition=1.1),
    "sample: tokens = None, first_new = i64[2]": lambda: ops.sample(x, first_new=classes),
    "sample: presence, tokens": lambda: ops.sample(x, presence=0.1),
    "sample: frequency, tokens": lambda: ops.sample(x, frequency=x[:, 0]),
    "penalize: tokens = i64[2], scores = f32[2,3]": lambda: ops.penalize(x, classes, classes),
    "penalize: tokens = f32[2,3], scores = f32[2,3]": lambda: ops.penalize(x, x, classes),
    "penalize: first_new = i64[1], scores = f32[2,3]": lambda: ops.penalize(x, x.long(), classes[:1]),
    "penalize: out = f32[3], scores = f32[2,3]": lambda: ops.penalize(x, x.long(), classes, out=x[0]),
    "top_k: scores = [3]": lambda: ops.top_k(x[0], 1),
    "top_k: k = 0, scores = f32[2,3]": lambda: ops.top_k(x, 0),
    "top_k: k = 4, scores = [2, 3]": lambda: ops.top_k(x, 4),
    "layer_norm: [2], [2, 3]": lambda: ops.layer_norm(x, (2,)),
    "layer_norm: [1, 2, 3], [2, 3]": lambda: ops.layer_norm(x, (1, 2, 3)),
    "layer_norm: [], [2, 3]": lambda: ops.layer_norm(x, ()),
    "layer_norm: weight = f32[2], x = f32[2,3]": lambda: ops.layer_norm(x, (3,), x[:, 0]),
    "layer_norm: weight = f32[2,3], x = f32[2,3]": lambda: ops.layer_norm(x, (3,), x),
    "layer_norm: bias = f32[2], x = f32[2,3]": lambda: ops.layer_norm(x, (3,), bias=x[:, 0]),
    "layer_norm: residual = f32[3], x = f32[2,3]": lambda: ops.layer_norm(x, (3,), residual=x[0]),
    "activation: bias = f32[2], x = f32[2,3]": lambda: ops.activation(x, bias=x[:, 0]),
    "activation: bias = f32[2,3], x = f32[2,3]": lambda: ops.activation(x, bias=x),
    "activation: up = f32[2], x = f32[2,3]": lambda: ops.activation(x, up=x[:, 0]),
    "activation: out = f32[2], x = f32[2,3]": lambda: ops.activation(x, out=x[:, 0].clone()),
    'activation: "swish"': lambda: ops.activation(x, "swish"),
    "activation: [2, 3], gated": lambda: ops.activation(x, gated=True),
    "activation: [], gated": lambda: ops.activation(x[0, 0], gated=True),
    "activation: up, gated": lambda: ops.activation(x[:, :2], up=x[:, :1], gated=True),
    "activation: bias, [3], [2, 2]": lambda: ops.activation(x[:, :2], bias=x[0], gated=True),
    "rms_norm: [2], [2, 3]": lambda: ops.rms_norm(x, (2,)),
    "rms_norm: weight = f32[2], x = f32[2,3]": lambda: ops.rms_norm(x, (3,), x[:, 0]),
    "rms_norm: residual = f32[3], x = f32[2,3]": lambda: ops.rms_norm(x, (3,), residual=x[0]),
    "rms_norm: out = f32[3,2], x = f32[2,3]": lambda: ops.rms_norm(x, (3,), out=x.mT),
    "layer_norm: out = f32[3], x = f32[2,3]": lambda: ops.layer_norm(x, (3,), out=x[0]),
    "layer_norm: sum = f16[2,3], x = f32[2,3], residual = f32[2,3]": lambda: ops.layer_norm(
        x, (3,), residual=x, return_sum=True, out=(x, x.half())
    ),
    "gelu: approximate": lambda: ops.gelu(x, approximate="erf"),
    "rope: x = f32[2,3]": lambda: ops.rope(x, *tables),
    "rope: cos = f32[5,4], x = f32[2,4,5,7]": lambda: ops.rope(q[..., 1:], *tables),
    "rope: cos = f32[5,4], sin = f32[4,4]": lambda: ops.rope(q, tables[0], tables[1][1:]),
    "rope: cos = f32[5,3]": lambda: ops.rope(q, *(t[:, 1:] for t in tables)),
    "rope: cos = f32[3,4], x = f32[2,4,5,8]": lambda: ops.rope(q, *(t[:3] for t in tables)),
    "rope: key = f32[2,3,5,8], x = f32[2,4,5,8]": lambda: ops.rope(q, *tables, key=k[:, 1:]),
    "rope: key = f32[2,4,5,7], x = f32[2,4,5,8]": lambda: ops.rope(q, *tables, key=k[..., 1:]),
    "rope: positions = i64[2], x = f32[2,4,5,8]": lambda: ops.rope(q, *tables, positions=index),
    "rope: key = f32[2,4,5,8], key_out = None": lambda: ops.rope(q, *tables, key=k, out=q.clone()),
    "rope: position = 5, cos = f32[5,4]": lambda: ops.rope(q, *tables, positions=index[0] + 5),
    "rope: position = -1, cos = f32[5,4]": lambda: ops.rope(q, *tables, positions=index[0] - 1),
    "dropout: residual = f32[2], x = f32[2,3]": lambda: ops.dropout(x, residual=x[:, 0]),
    "dropout: out = f32[3], x = f32[2,3]": lambda: ops.dropout(x, out=x[0].clone()),
    "dropout: p = -0.1": lambda: ops.dropout(x, -0.1),
    "dropout: p = 1.1": lambda: ops.dropout(x, 1.1),
    "dropout: p = nan": lambda: ops.dropout(x, float("nan")),
    "dropout: seed = i64[2]": lambda: ops.dropout(x, seed=index),
    "dropout: seed = f32[]": lambda: ops.dropout(x, seed=x[0, 0]),
    "dropout: 9223372036854775808": lambda: ops.dropout(x, seed=2**63),
    "embedding_sum: table = f32[3]": lambda: ops.embedding_sum([index], [x[0]]),
    "embedding_sum: indices": lambda: ops.embedding_sum([], []),
    "embedding_sum: indices.size() == tables.size(), count = 1": lambda: ops.embedding_sum([index] * 2, [x]),
    "embedding_sum: count = 5": lambda: ops.embedding_sum([index] * 5, [x] * 5),
    "embedding_sum: i64[3], i64[2]": lambda: ops.embedding_sum([index, index.new_zeros(3)], [x, x]),
    "embedding_sum: table = f32[2,2]": lambda: ops.embedding_sum([index] * 2, [x, x[:, :2]]),
    "pack_linear: float32[3]": lambda: ops.pack_linear(x[0]),
    "pack_linear: float32[1, 1, 2, 3]": lambda: ops.pack_linear(x[None, None]),
    "pack_linear: scales = float32[2, 3, 1]": lambda: ops.pack_linear(int8(scales=torch.ones(2, 3, 1))),
    "pack_linear: scales = f32[2,2], weight = i8[2,3]": lambda: ops.pack_linear(
        int8(scales=torch.ones(2, 2))
    ),
    "pack_linear: weight = f32[2,3]": lambda: ops.pack_linear(int8(values=x)),
    "pack_linear: in_features = 4": lambda: ops.pack_linear(int8(in_features=4)),
    'pack_linear: format = "int4"': lambda: ops.pack_linear(int8(format="int4")),
    'pack_linear: format = "int3"': lambda: ops.pack_linear(int8(format="int3")),
    "pack_linear: zero_points = true": lambda: ops.pack_linear(int8(zeros=torch.zeros(2, 1).byte())),
    **{
        f"pack_linear: is_group, group_size = {size}, {format}": lambda format=format, size=size: (
            ops.pack_linear(int8(format=format, group_size=size))
        )
        for format in ("int8", "int8_dynamic", "int4", "nf4")
        for size in (-1, 0, 1)
    },
    'pack_linear: group_size = 2, "int8_dynamic"': lambda: ops.pack_linear(
        int8(format="int8_dynamic", group_size=2)
    ),
    "pack_linear: rows = 3": lambda: ops.pack_linear(torch.zeros(3, 3), gated=True),
    "unpack_linear: packed = u8[1,192], rows = 17": lambda: ops.unpack_linear(
        packed._replace(out_features=17)
    ),
    "unpack_linear: packed = u8[1,192], depth = 99": lambda: ops.unpack_linear(
        packed._replace(in_features=99)
    ),
    "linear: float32[2, 2], in_features = 3": lambda: ops.linear(x[:, :2], packed),
    "linear: float32[2, 3], float32[2, 2]": lambda: ops.linear(x, x[:, :2]),
    "linear: packed = u8[1,8]": lambda: ops.linear(x, packed._replace(data=packed.data[:, :8].clone())),
    "linear: packed = u8[1,192], rows = 17": lambda: ops.linear(x, packed._replace(out_features=17)),
    "linear: out_features = -1": lambda: ops.linear(x, packed._replace(out_features=-1)),
    "linear: bias = f32[3], out = f32[2,4]": lambda: ops.linear(x, packed, x[0]),
    "linear: residual = f32[2,3], out = f32[2,4]": lambda: ops.linear(x, packed, residual=x),
    "linear: activation": lambda: ops.linear(x, packed, activation="swish"),
    "scaled_dot_product_attention: query = f32[]": lambda: attention(x[0, 0], k, v),
    "scaled_dot_product_attention: query = f32[8]": lambda: attention(q[0, 0, 0], k, v),
    "scaled_dot_product_attention: value = f32[8]": lambda: attention(q, k, v[0, 0, 0]),
    "scaled_dot_product_attention: query = f32[3,4,5,8], key = f32[2,4,5,8]": lambda: attention(
        q[[0, 0, 0]], k, v
    ),
    "scaled_dot_product_attention: query = f32[2,4,5,7], key = f32[2,4,5,8]": lambda: attention(
        q[..., 1:], k, v
    ),
    "scaled_dot_product_attention: key = f32[2,4,5,8], value = f32[2,4,4,8]": lambda: attention(
        q, k, v[:, :, 1:]
    ),
    "scaled_dot_product_attention: key = f32[2,4,5,8], value = f32[2,2,5,8]": lambda: attention(
        q, k, v[:, ::2]
    ),
    "scaled_dot_product_attention: [2, 4, 5, 8], [2, 2, 5, 8]": lambda: attention(q, k[:, ::2], v[:, ::2]),
    "scaled_dot_product_attention: query = f32[2,4,5,8], key = f32[2,3,5,8]": lambda: attention(
        q, k[:, 1:], v[:, 1:], enable_gqa=True
    ),
    "sort_by_expert: expert_ids = [2]": lambda: ops.sort_by_expert(index, 3),
    "sort_by_expert: num_experts = -1": lambda: ops.sort_by_expert(places, -1),
    "sort_by_expert: expert_ids = f32[2,3]": lambda: ops.sort_by_expert(x, 3),
    "sort_by_expert: expert = 3, experts = 3, expert_ids = i64[2,2]": lambda: ops.sort_by_expert(places, 3),
    "spread_rows: input = [3], places = [2, 2]": lambda: ops.spread_rows(x[0], order, places),
    "spread_rows: input = [4, 3], places = [2, 2]": lambda: ops.spread_rows(four, order, places),
    "spread_rows: order = [2], places = [2, 2]": lambda: ops.spread_rows(x, index, places),
    "spread_rows: order = i32[4]": lambda: ops.spread_rows(x, order.int(), places),
    "spread_rows: place = 4, order = i64[4]": lambda: ops.spread_rows(x, order + 1, places),
    "sum_rows: rows = [2, 3], places = [2, 2]": lambda: ops.sum_rows(x, None, order, places),
    "sum_rows: order = [4], places = [4]": lambda: ops.sum_rows(four, None, order, order),
    "sum_rows: weights = f32[2,3], places = i64[2,2]": lambda: ops.sum_rows(four, x, order, places),
    "sum_rows: places = i32[2,2]": lambda: ops.sum_rows(four, None, order, places.int()),
    "sum_rows: row = -1, places = i64[2,2]": lambda: ops.sum_rows(four, None, order, places - 1),
    "scaled_dot_product_attention: mask = f32[1,1,2,3], query = f32[2,4,5,8]": lambda: attention(q, k, v, x),
    "scaled_dot_product_attention: position_bias = f32[2,3], query = f32[2,4,5,8]": lambda: attention(
        q, k, v, position_bias=x
    ),
    "scaled_dot_product_attention: dropout_p = 1.5": lambda: attention(q, k, v, dropout_p=1.5),
    "scaled_dot_product_attention: cu_seqlens_q = i32[2], cu_seqlens_k = None": lambda: packed_attention(
        starts(0, 4), None
    ),
    "scaled_dot_product_attention: cu_seqlens_q = i32[0]": lambda: packed_attention(starts(), starts()),
    "scaled_dot_product_attention: cu_seqlens_q = i32[2], query = f32[1,5,4,8]": lambda: packed_attention(
        starts(0, 5), starts(0, 4)
    ),
    "scaled_dot_product_attention: cu_seqlens_k = i32[3], key = f32[1,5,4,8]": lambda: packed_attention(
        starts(0, 2, 4), starts(0, 5, 4)
    ),
    "scaled_dot_product_attention: cu_seqlens_q = i32[2], cu_seqlens_k = i32[3]": lambda: packed_attention(
        starts(0, 4), starts(0, 2, 4)
    ),
    "scaled_dot_product_attention: cu_seqlens_q = i64[2]": lambda: packed_attention(
        starts(0, 4, dtype=torch.int64), starts(0, 4)
    ),
    "cached_attention: [4, 5, 8]": lambda: cached(q[0]),
    "cached_attention: query = f32[2,4,4,7], key_cache = f32[2,6,2,8]": lambda: cached(q[:, :, :4, 1:]),
    "cached_attention: query = f32[2,4,5,8], key_cache = f32[2,6,2,8]": lambda: cached(q),
    "cached_attention: key_cache = f32[2,6,2,8], value_cache = f32[2,5,2,8]": lambda: cached(v=cache[:, 1:]),
    "cached_attention: key_cache = f32[2,6,2,4]": lambda: cached(q[:, :, :4, ::2], cache[..., ::2]),
    "cached_attention: query = f32[1,4,4,8], lengths = i32[2]": lambda: cached(q[:1, :, :4]),
    "cached_attention: lengths = i64[2]": lambda: cached(lengths=lengths.long()),
    "cached_attention: lengths = i32[1], key_cache = f32[2,6,2,8]": lambda: cached(lengths=lengths[:1]),
    "cached_attention: block_table = i32[2], lengths = i32[2]": lambda: cached(block_table=lengths),
    "cached_attention: block_table = i64[2,1]": lambda: cached(block_table=lengths[:, None].long()),
    "cached_attention: key_cache = f32[2,6,2,8], key_scales = f32[2,6,2], value_scales = None": lambda: (
        cached(key_scales=cache[..., 0])
    ),
    "cached_attention: key_cache = i8[2,6,2,8], key_scales = None": lambda: cached(
        k=cache.to(torch.int8), v=cache.to(torch.int8)
    ),
    "cached_attention: key_cache = f16[2,6,2,8], query = f32[2,4,4,8]": lambda: cached(
        q[:, :, :4], cache.half(), cache.half()
    ),
    "cached_attention: sinks = f32[3], query = f32[2,4,4,8]": lambda: cached(q[:, :, :4], sinks=x[0]),
    "cached_attention: position_bias = f32[2,3], query = f32[2,4,4,8]": lambda: cached(
        q[:, :, :4], position_bias=x
    ),
    "cached_attention: position_bias = f32[5,4], bidirectional = true, max_distance = 1": lambda: cached(
        q[:, :, :4], position_bias=q[0, 0, :, :4], position_max_distance=1
    ),
    "cached_attention: [2, 4, 5, 8]": lambda: cached(cu_seqlens_q=starts(0, 1, 2)),
    "cached_attention: query = f32[4,4,8], cu_seqlens_q = i32[2], lengths = i32[2]": lambda: cached(
        q[0, :, :4], cu_seqlens_q=starts(0, 4)
    ),
    "cached_attention: query = f32[4,4,8], cu_seqlens_q = i32[3]": lambda: cached(
        q[0, :, :4], cu_seqlens_q=starts(0, 3, 2)
    ),
    "cached_attention: cu_seqlens_q = i64[3]": lambda: cached(
        q[0, :, :4], cu_seqlens_q=starts(0, 1, 4, dtype=torch.int64)
    ),
    "cached_attention: softcap = -1": lambda: cached(q[:, :, :4], softcap=-1.0),
    "copy_blocks_: cache = f32[6]": lambda: ops.copy_blocks_(cache[0, :, 0, 0].clone(), blocks, blocks, 1),
    "copy_blocks_: cache = f32[2,6,2,7]": lambda: ops.copy_blocks_(cache[..., 1:], blocks, blocks, 1),
    "copy_blocks_: old_blocks = i32[1]": lambda: ops.copy_blocks_(cache, blocks.int(), blocks, 1),
    "copy_blocks_: new_blocks = i64[2], old_blocks = i64[1]": lambda: ops.copy_blocks_(
        cache, blocks, blocks.repeat(2), 1
    ),
    "copy_blocks_: count = 7, cache = f32[2,6,2,8]": lambda: ops.copy_blocks_(cache, blocks, blocks, 7),
    "copy_blocks_: count = -1, cache": lambda: ops.copy_blocks_(cache, blocks, blocks, -1),
    "copy_blocks_: block = 2, cache": lambda: ops.copy_blocks_(cache, blocks, blocks + 2, 1),
    "append_to_cache_: key = f32[2,6,2], ": lambda: append(cache[..., 0]),
    "append_to_cache_: key = f32[2,1,2,8]": lambda: append(cu_seqlens=starts(0, 1, 2)),
    "append_to_cache_: key = f32[6,2,8], cu_seqlens = i32[3], lengths = i32[2]": lambda: append(
        cache[0], cache[0], cu_seqlens=starts(0, 7, 6)
    ),
    "append_to_cache_: key = f32[2,1,2,7], key_cache = f32[2,6,2,8]": lambda: append(cache[:, :1, :, 1:]),
    "append_to_cache_: value = f32[2,1,1,8], value_cache = f32[2,6,2,8]": lambda: append(
        value=cache[:, :1, :1]
    ),
    "append_to_cache_: key = f32[2,2,2,8], value = f32[2,1,2,8]": lambda: append(cache[:, :2]),
    "append_to_cache_: key = f32[1,1,2,8], lengths = i32[2]": lambda: append(cache[:1, :1], cache[:1, :1]),
}


@pytest.mark.parametrize("message", SHAPES)
def test_shapes(message):
    with pytest.raises(InputError) as caught:
        SHAPES[message]()
    assert_names(caught, message)


def test_too_many_dimensions():
    """Refused before the op is entered, hence without its name."""
    with pytest.raises(InputError, match=r"shape .*\[1, 1, 1, 1, 1, 1, 1, 2, 3\].* more than 8 dimensions"):
        ops.softmax(x[(None,) * 7])


def assert_names(caught, message):
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RuntimeError)
    op, parts = message.split(": ")
    text = str(caught.value)
    assert text.startswith(f"{op}: ")
    for part in re.split(r", (?![^[]*\])", parts):  # at commas outside brackets
        assert part in text


CALLS = {  # every tensor operand by its name in the error message
    "softmax: x": lambda t: ops.softmax(t(x)),
    "softmax: mask": lambda t: ops.softmax(x, mask=t(x)),
    "log_softmax: x": lambda t: ops.log_softmax(t(x)),
    "log_softmax: mask": lambda t: ops.log_softmax(x, mask=t(x)),
    "cross_entropy: x": lambda t: ops.cross_entropy(t(x), classes),
    "cross_entropy: weight": lambda t: ops.cross_entropy(x, classes, t(x[0])),
    "layer_norm: x": lambda t: ops.layer_norm(t(x), (3,)),
    "layer_norm: residual": lambda t: ops.layer_norm(x, (3,), residual=t(x)),
    "layer_norm: weight": lambda t: ops.layer_norm(x, (3,), t(x[0])),
    "layer_norm: bias": lambda t: ops.layer_norm(x, (3,), bias=t(x[0])),
    "activation: x": lambda t: ops.activation(t(x)),
    "activation: up": lambda t: ops.activation(x, up=t(x)),
    "activation: bias": lambda t: ops.activation(x, bias=t(x[0])),
    "rope: x": lambda t: ops.rope(t(q), *tables),
    "rope: key": lambda t: ops.rope(q, *tables, key=t(k)),
    "rope: cos": lambda t: ops.rope(q, t(tables[0]), tables[1]),
    "rope: sin": lambda t: ops.rope(q, tables[0], t(tables[1])),
    "dropout: x": lambda t: ops.dropout(t(x), seed=torch.tensor(1)),
    "dropout: residual": lambda t: ops.dropout(x, residual=t(x)),
    "layer_norm: out": lambda t: ops.layer_norm(x, (3,), out=t(x)),
    "rms_norm: x": lambda t: ops.rms_norm(t(x), (3,)),
    "rms_norm: residual": lambda t: ops.rms_norm(x, (3,), residual=t(x)),
    "rms_norm: weight": lambda t: ops.rms_norm(x, (3,), t(x[0])),
    "rms_norm: out": lambda t: ops.rms_norm(x, (3,), out=t(x)),
    "embedding_sum: table": lambda t: ops.embedding_sum([index], [t(x)]),
    "pack_linear: weight": lambda t: ops.pack_linear(t(x)).data,
    "linear: x": lambda t: ops.linear(t(x), packed),
    "linear: bias": lambda t: ops.linear(x, packed, t(x[0, [0, 1, 2, 0]])),
    "linear: residual": lambda t: ops.linear(x, packed, residual=t(x[:, [0, 1, 2, 0]])),
    "spread_rows: input": lambda t: ops.spread_rows(t(x), order, places),
    "sum_rows: rows": lambda t: ops.sum_rows(t(four), None, order, places),
    "sum_rows: weights": lambda t: ops.sum_rows(four, t(x[:, :2]), order, places),
    "scaled_dot_product_attention: query": lambda t: attention(t(q), k, v),
    "scaled_dot_product_attention: key": lambda t: attention(q, t(k), v),
    "scaled_dot_product_attention: value": lambda t: attention(q, k, t(v)),
    "scaled_dot_product_attention: mask": lambda t: attention(q, k, v, t(x[:1, :1])),
    "scaled_dot_product_attention: position_bias": lambda t: attention(
        q, k, v, position_bias=t(q[0, 0, :, :4])
    ),
    "cached_attention: query": lambda t: cached(t(q[:, :, :4])),
    "cached_attention: key_cache": lambda t: cached(q[:, :, :4], t(cache)),
    "cached_attention: value_cache": lambda t: cached(q[:, :, :4], v=t(cache)),
    "cached_attention: position_bias": lambda t: cached(q[:, :, :4], position_bias=t(q[0, 0, :, :4])),
    "copy_blocks_: cache": lambda t: ops.copy_blocks_(t(cache), blocks, blocks, 1),
    "copy_blocks_: old_blocks": lambda t: ops.copy_blocks_(cache, t(blocks), blocks, 1),
    "copy_blocks_: new_blocks": lambda t: ops.copy_blocks_(cache, blocks, t(blocks), 1),
    "append_to_cache_: key": lambda t: ops.append_to_cache_(t(cache), cache, cache, cache, lengths),
    "append_to_cache_: value": lambda t: ops.append_to_cache_(cache, t(cache), cache, cache, lengths),
}


@pytest.mark.parametrize("operand", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32, torch.uint8])
def test_dtypes(operand, dtype):
    with pytest.raises(InputError) as caught:
        CALLS[operand](lambda t: t.to(dtype))
    shown = {torch.int32: "i32", torch.uint8: "u8"}.get(dtype, "unsupported dtype")
    assert_names(caught, f"{operand} = {shown}[")


@pytest.mark.parametrize("index_dtype", [torch.float32, torch.bool, torch.int16])
def test_index_dtypes(index_dtype):
    with pytest.raises(InputError, match=r"^embedding_sum: .*index = .*\[2\]"):
        ops.embedding_sum([index.to(index_dtype)], [x])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int16])
def test_target_dtypes(dtype):
    """Among them probabilities, which torch takes."""
    with pytest.raises(InputError, match=r"^cross_entropy: .*target = .*\[2\]"):
        ops.cross_entropy(x, classes.to(dtype))


@pytest.mark.parametrize("result", [torch.float64, torch.int32, torch.complex64])
def test_softmax_result_dtypes(result):
    with pytest.raises(InputError, match=r"^softmax: .*out = .*\[2,3\]"):
        ops.softmax(x, dtype=result)


@pytest.mark.parametrize("operand", CALLS)
def test_devices(operand):
    """One operand without memory among others with: not silence, and not an uninitialized result."""
    inputs = ("softmax: x", "log_softmax: x", "layer_norm: x", "rms_norm: x", "activation: x")
    alone = operand in (*inputs, "pack_linear: weight")
    if alone:
        assert CALLS[operand](lambda t: t.to("meta")).is_meta
        return
    with pytest.raises(InputError, match=operand.split(": ")[0]):
        CALLS[operand](lambda t: t.to("meta"))


@pytest.mark.parametrize("operand", CALLS)
@pytest.mark.parametrize(
    "value", [[1.0], "text", 3, np.zeros((2, 3), np.float32)], ids=lambda v: type(v).__name__
)
def test_not_a_tensor(operand, value):
    with pytest.raises(TypeError) as caught:
        CALLS[operand](lambda t: value)
    assert_type_error(caught, operand, value)


OPTIONAL = "mask|bias|residual|out|(norm|cross_entropy): weight|sum_rows: weights|activation: up|rope: key"
REQUIRED = [o for o in CALLS if not re.search(OPTIONAL, o)]


@pytest.mark.parametrize("operand", REQUIRED)
def test_none(operand):
    with pytest.raises(TypeError) as caught:
        CALLS[operand](lambda t: None)
    assert_type_error(caught, operand, None)


def assert_type_error(caught, operand, value):
    op, name = operand.split(": ")
    named = {"x": "input", "mask": "mask", "table": "tables"}.get(name, name)
    text = str(caught.value)
    assert text.startswith(f"{op}: ")
    assert named in text
    assert type(value).__name__ in text


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)
def test_fake_tensors_in_the_extension(sample):
    """They have no memory: an error, not a crash."""
    name, args, _ = sample(torch.float32).kernel()
    mode = FakeTensorMode()
    for i, operand in enumerate(args):
        if not isinstance(operand, torch.Tensor):
            continue
        fake = mode.from_tensor(operand)
        shape = ",".join(map(str, operand.shape))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the access to its data pointer
            with pytest.raises(InputError, match=rf"^{name}: .* = \w+\[{shape}\] cpu without memory"):
                getattr(_C, name)(*args[:i], fake, *args[i + 1 :])


@pytest.mark.parametrize("threads", [0, -1])
def test_threads(threads):
    with pytest.raises(InputError, match=f"softmax: executor > 0 failed: executor = {threads}"):
        _C.softmax(x, None, x.clone(), -1, 1.0, False, threads)
