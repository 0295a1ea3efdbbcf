"""torch's own operator database as inputs: every sample that our signatures can express."""

from functools import cache, partial

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from tests.check import is_float
from warpformer import ops


def linear(x, weight, bias=None):
    if weight.ndim != 2:  # a vector
        return None
    return ops.linear(x, weight, bias)


def embedding(weight, index, padding_idx=None, **options):
    return None if options else ops.embedding(index, weight, padding_idx)


def cross_entropy(x, target, **options):
    return None if target.is_floating_point() else ops.cross_entropy(x, target, **options)


def attention(query, key, value, *mask, dropout_p=0.0, **options):
    if dropout_p or query.shape[:-3] != key.shape[:-3]:  # no dropout, no broadcast batches
        return None
    return ops.scaled_dot_product_attention(query, key, value, *mask, **options)


def softmax(x, dim, dtype=None):
    return None if dtype is torch.float64 else ops.softmax(x, dim, dtype=dtype)


def log_softmax(x, dim, dtype=None):
    return None if dtype is torch.float64 else ops.log_softmax(x, dim, dtype=dtype)


OPS = {  # with the number of samples of torch 2.13 that they can express
    "softmax": (softmax, 7),
    "log_softmax": (log_softmax, 7),
    "nn.functional.cross_entropy": (cross_entropy, 1),
    "nn.functional.layer_norm": (ops.layer_norm, 6),
    "nn.functional.rms_norm": (ops.rms_norm, 1),
    "nn.functional.gelu": (ops.gelu, 8),
    "nn.functional.silu": (ops.silu, 2),
    "nn.functional.relu": (ops.relu, 2),
    "tanh": (partial(ops.activation, activation="tanh"), 1),
    "nn.functional.linear": (linear, 18),
    "nn.functional.scaled_dot_product_attention": (attention, 9),
    "nn.functional.embedding": (embedding, 5),
}


@cache
def expected(name, dtype):
    """The samples of an op, each with torch's output and that of float64: the same for every device."""
    found = []
    for entry in (entry for entry in op_db if entry.name == name):
        for sample in entry.sample_inputs("cpu", dtype):
            exact = sample.transform(lambda v: v.double() if is_float(v) else v)
            outputs = (entry.op(s.input, *s.args, **s.kwargs) for s in (sample, exact))
            found.append((sample, *outputs))
    return found


@pytest.mark.parametrize("name", OPS)
def test_samples(device, dtype, name):
    function, least = OPS[name]
    ran = 0
    for sample, by_torch, truth in expected(name, dtype):
        out = function(sample.input, *sample.args, **sample.kwargs)
        if out is None:
            continue
        assert (out.dtype, out.shape) == (by_torch.dtype, by_torch.shape)
        assert torch.equal(out.isnan(), by_torch.isnan())
        # Too few outputs for the policy of check(): what counts here is what the op means.
        assert error(out, truth) <= 4 * max(error(by_torch, truth), torch.finfo(dtype).eps)
        ran += 1
    assert ran >= least


def error(out, truth):
    difference, truth = (out.double() - truth).nan_to_num(), truth.nan_to_num()
    return (difference.norm() / truth.norm().clamp(min=1e-30)).item()
