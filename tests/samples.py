"""One valid call per op (two of each attention), with every operand given: what the tests that hold for all
ops run on. Sizes have tails and are large enough for three threads.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import wraps
from unittest import mock

import torch
from torch import Tensor

from warpformer import _C, ops


@dataclass(frozen=True)
class Sample:
    op: Callable
    args: tuple
    kwargs: dict = field(default_factory=dict)
    fixed: tuple[Tensor, ...] = ()  # operands that must be contiguous
    constant: tuple[Tensor, ...] = ()  # operands that have no gradient, though others have

    def __call__(self):
        return self.op(*self.args, **self.kwargs)

    def map(self, function):
        """The call with `function(tensor)` in place of every floating point operand of free layout."""

        def apply(value):
            if isinstance(value, (list, tuple)) and not isinstance(value, ops.PackedWeight):
                return type(value)(map(apply, value))
            free = isinstance(value, Tensor) and not any(value is t for t in self.fixed)
            return function(value) if free and value.is_floating_point() else value

        return replace(
            self, args=apply(self.args), kwargs={name: apply(v) for name, v in self.kwargs.items()}
        )

    def leaves(self):
        """The call with operands that require gradients, and these operands."""
        constant = {t.data_ptr() for t in self.constant}
        call = self.map(lambda t: t.detach().requires_grad_(t.data_ptr() not in constant))
        found = []
        call.map(lambda t: found.append(t) if t.requires_grad else None)
        return call, found

    def kernel(self):
        """The one call of `_C` that the op makes: its name, its arguments and, of those, the output."""
        names = [name for name in ops.__all__ if hasattr(_C, name)]
        with ExitStack() as stack:
            spies = {n: mock.patch.object(_C, n, wraps=getattr(_C, n)) for n in names}
            spies = {n: stack.enter_context(spy) for n, spy in spies.items()}
            result = self()
        ((name, args),) = ((n, call.args) for n, spy in spies.items() for call in spy.call_args_list)
        (out,) = (a for a in args if isinstance(a, Tensor) and a.data_ptr() == result.data_ptr())
        return name, list(args), out


def softmax(dtype):
    x = torch.randn(60, 7, 131, dtype=dtype)
    return Sample(ops.softmax, (x,), {"mask": torch.randn(7, 1, dtype=dtype), "scale": 0.5})


def log_softmax(dtype):
    return replace(softmax(dtype), op=ops.log_softmax)


def cross_entropy(dtype):
    x, weight = torch.randn(60, 131, 7, dtype=dtype), torch.rand(131, dtype=dtype)
    target = torch.randint(131, (60, 7))
    target[::3] = -100
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    return Sample(ops.cross_entropy, (x, target, weight), options, constant=(weight,))


def sample(dtype):
    draws, top_k = torch.rand(420, dtype=torch.float64), torch.arange(420) % 9
    options = {"temperature": 0.7, "top_k": top_k, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}
    options |= {"tokens": torch.randint(-1, 131, (420, 30)), "first_new": torch.arange(420) % 30}
    options |= {"repetition": 1.2, "frequency": 0.1, "presence": torch.rand(420)}
    return Sample(ops.sample, (torch.randn(420, 131, dtype=dtype), draws), options, fixed=(draws,))


def penalize(dtype):
    tokens, new = torch.randint(-1, 131, (420, 30)), torch.arange(420) % 30
    options = {"repetition": 1.2, "frequency": 0.1, "presence": 0.3}
    return Sample(ops.penalize, (torch.randn(420, 131, dtype=dtype), tokens, new), options)


def top_k(dtype):
    @wraps(ops.top_k)
    def values(*args):
        return ops.top_k(*args)[0]

    return Sample(values, (torch.randn(420, 131, dtype=dtype), 9), {})


def layer_norm(dtype):
    x, residual = torch.randn(2, 400, 131, dtype=dtype)
    weight, bias = torch.randn(2, 131, dtype=dtype)
    return Sample(ops.layer_norm, (x, (131,), weight, bias, 1e-6), {"residual": residual})


def activation(dtype):
    x, up = torch.randn(2, 400, 131, dtype=dtype)
    return Sample(ops.activation, (x, "gelu_tanh"), {"up": up, "bias": torch.randn(131, dtype=dtype)})


def rope(dtype):
    tables = ops.rope_tables(ops.rope_frequencies(32)[0], 60)
    positions = torch.randint(60, (3, 41))
    return Sample(
        ops.rope, (torch.randn(3, 41, 7, 37, dtype=dtype), *tables), {"positions": positions}, fixed=tables
    )


def dropout(dtype):
    x, residual = torch.randn(2, 400, 131, dtype=dtype)
    return Sample(ops.dropout, (x, 0.3), {"residual": residual, "seed": torch.tensor(17)})


def rms_norm(dtype):
    x, residual = torch.randn(2, 400, 131, dtype=dtype)
    return Sample(ops.rms_norm, (x, (131,), torch.randn(131, dtype=dtype), 1e-6), {"residual": residual})


def embedding_sum(dtype):
    indices = [torch.randint(v, (20, 41)) for v in (50, 41)]
    tables = [torch.randn(v, 131, dtype=dtype) for v in (50, 41)]
    return Sample(ops.embedding_sum, (indices, tables), {"padding_idx": [0, None]})


def pack_linear(dtype):
    def data(weight):
        return ops.pack_linear(weight).data

    data.__name__ = "pack_linear"
    return Sample(data, (torch.randn(1000, 131, dtype=dtype),))


def linear(dtype):
    return _linear(ops.pack_linear(torch.randn(75, 131, dtype=dtype)), 75, dtype)


def quantized_linear(dtype):
    """Gated, in groups with zero points, of quantized rows: all that a linear layer can be."""
    values, zeros = torch.randint(256, (150, 66)).byte(), torch.randint(16, (150, 5)).byte()
    scales = torch.rand(150, 5).bfloat16()
    weight = ops.QuantizedWeight(values, scales, zeros, "int4_dynamic", 131, 32)
    return _linear(ops.pack_linear(weight, gated=True), 150, dtype)


def _linear(packed, features, dtype):
    residual, bias = torch.randn(4, 25, 75, dtype=dtype), torch.randn(features, dtype=dtype)
    args = (torch.randn(4, 25, 131, dtype=dtype), packed, bias)
    return Sample(ops.linear, args, {"activation": "gelu", "residual": residual}, fixed=(packed.data,))


def grouped_linear(dtype):
    packed, offsets = (
        ops.pack_linear(torch.randn(3, 80, 131, dtype=dtype), gated=True),
        torch.tensor([7, 7, 60]),
    )
    args = (torch.randn(60, 131, dtype=dtype), packed, offsets, torch.randn(3, 80, dtype=dtype))
    return Sample(ops.grouped_linear, args, {"activation": "silu"}, fixed=(packed.data, offsets))


def quantized_grouped_linear(dtype):
    values, scales = torch.randint(-127, 128, (3, 80, 131)).to(torch.int8), torch.rand(3, 80, 5).bfloat16()
    packed = ops.pack_linear(ops.QuantizedWeight(values, scales, None, "int8", 131, 32), gated=True)
    args = (torch.randn(60, 131, dtype=dtype), packed, torch.tensor([7, 7, 60]))
    args = (*args, torch.randn(3, 80, dtype=dtype))
    return Sample(ops.grouped_linear, args, {"activation": "silu"}, fixed=(packed.data, args[2]))


def spread_rows(dtype):
    routes = ops.sort_by_expert(torch.randint(5, (60, 3)), 5)[:2]
    return Sample(ops.spread_rows, (torch.randn(60, 131, dtype=dtype), *routes))


def sum_rows(dtype):
    routes = ops.sort_by_expert(torch.randint(5, (60, 3)), 5)[:2]
    args = (torch.randn(180, 131, dtype=dtype), torch.rand(60, 3, dtype=dtype))
    return Sample(ops.sum_rows, (*args, *routes))


def attention(dtype):
    query = torch.randn(2, 4, 37, 24, dtype=dtype)
    key, value = torch.randn(2, 2, 2, 270, 24, dtype=dtype)
    mask = torch.randn(4, 37, 270, dtype=dtype)
    table = torch.randn(8, 4, dtype=dtype)
    options = {"is_causal": True, "scale": 0.3, "enable_gqa": True, "position_bias": table}
    options |= {"dropout_p": 0.2, "seed": torch.tensor(17)}
    return Sample(ops.scaled_dot_product_attention, (query, key, value, mask), options)


def packed_attention(dtype):
    query, key, value = torch.randn(3, 60, 4, 24, dtype=dtype)
    starts = torch.tensor([0, 17, 17, 60], dtype=torch.int32)
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return Sample(ops.scaled_dot_product_attention, (query, key, value), lengths, fixed=(starts,))


attention.OP = packed_attention.OP = "scaled_dot_product_attention"


def cached_attention(dtype):
    key_cache, value_cache = torch.randn(2, 12, 64, 2, 24, dtype=dtype)
    lengths, table = torch.tensor([230, 0, 91]).int(), torch.arange(12).flip(0).int().view(3, 4)
    slopes, sinks = torch.rand(2, 4)
    options = {"block_table": table, "scale": 0.3, "alibi_slopes": slopes, "sinks": sinks}
    options["position_bias"] = torch.randn(32, 4, dtype=dtype)
    args = (torch.randn(3, 3, 4, 24, dtype=dtype), key_cache, value_cache, lengths)
    return Sample(ops.cached_attention, args, options, fixed=(key_cache, value_cache, slopes, sinks))


def packed_cached_attention(dtype):
    call = cached_attention(dtype)
    query, *caches = call.args
    starts = torch.tensor([0, 2, 2, 9], dtype=torch.int32)
    options = {**call.kwargs, "cu_seqlens_q": starts}
    return replace(call, args=(query.flatten(0, 1), *caches), kwargs=options)


def others():
    """A valid call of each op that is none of SAMPLES, as it has another form."""
    x, cache = torch.randn(4, 24), torch.randn(2, 16, 2, 8)
    new, tokens = torch.randn(2, 3, 2, 8), torch.tensor([4, 0], dtype=torch.int32)
    cos, sin = ops.rope_tables(ops.rope_frequencies(8)[0], 60)
    starts = torch.tensor([0, 3], dtype=torch.int32)
    rotated = {"query": torch.randn(2, 3, 4, 8), "cos": cos, "sin": sin}
    held = {"cache_seqlens": tokens, "rotary_cos": cos, "rotary_sin": sin}
    return (
        Sample(ops.gelu, (x, "tanh")),
        Sample(ops.silu, (x,)),
        Sample(ops.relu, (x,)),
        Sample(ops.embedding, (torch.randint(4, (3,)), x, 1)),
        Sample(ops.unpack_linear, (ops.pack_linear(x),), {"rows": torch.tensor([1, 2])}),
        Sample(ops.linear, (x, torch.randn(6, 24)), {"rows": (0, 6)}),
        Sample(ops.rope_frequencies, (8,)),
        Sample(ops.rope_tables, (torch.rand(4), 60)),
        Sample(ops.append_to_cache_, (new, new, cache, cache.clone(), tokens), rotated),
        Sample(ops.sort_by_expert, (torch.randint(5, (4, 2)), 5)),
        Sample(ops.copy_blocks_, (cache, torch.tensor([0]), torch.tensor([1]), 3)),
        Sample(ops.flash_attn_func, (new, new, new)),
        Sample(ops.flash_attn_varlen_func, (new[0], new[0], new[0], starts, starts)),
        Sample(ops.flash_attn_with_kvcache, (new, cache, cache.clone(), new, new), held),
    )


SAMPLES = (
    softmax,
    log_softmax,
    cross_entropy,
    sample,
    penalize,
    top_k,
    layer_norm,
    activation,
    rope,
    dropout,
    rms_norm,
    embedding_sum,
    pack_linear,
    linear,
    quantized_linear,
    grouped_linear,
    quantized_grouped_linear,
    spread_rows,
    sum_rows,
    attention,
    packed_attention,
    cached_attention,
    packed_cached_attention,
)
quantized_linear.OP, quantized_grouped_linear.OP = "linear", "grouped_linear"
# Products of dense weights are torch's on CUDA.
linear.OP = pack_linear.OP = grouped_linear.OP = "none"
FORWARD_ONLY = (cached_attention, packed_cached_attention, penalize, top_k)
WITH_GRADIENT = tuple(s for s in SAMPLES if s not in (*FORWARD_ONLY, pack_linear, sample))
