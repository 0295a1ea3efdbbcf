"""What holds for every op: the same bits for any number of threads, any strides and any array library."""

import pytest
import torch
from torch import Tensor

from tests.check import is_float, same_bits, threads
from tests.samples import SAMPLES
from warpformer import _C

pytestmark = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)


def test_any_number_of_threads(device, dtype, sample):
    call = sample(dtype)
    with threads(1):
        expected = call()
    for count in (2, 3, 1, 2):
        with threads(count):
            assert same_bits(call(), expected)


def every_second(t):
    return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]


def column_major(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.ndim > 1 else t


def offset(t):
    return torch.cat([t.new_full((3,), torch.nan), t.flatten()])[3:].view(t.shape)


@pytest.mark.parametrize("layout", [every_second, column_major, offset])
def test_any_strides(device, dtype, sample, layout):
    call = sample(dtype)
    assert same_bits(call.map(layout)(), call())


@pytest.mark.parametrize("dim", [0, -1])
def test_broadcast(device, dtype, sample, dim):
    """Stride 0 in one dimension of every operand."""
    expanded = sample(dtype).map(lambda t: t.narrow(dim, 0, 1).expand(t.shape))
    assert same_bits(expanded(), expanded.map(Tensor.clone)())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=("f32", "f16"))
@pytest.mark.parametrize("negative_strides", [False, True])
def test_numpy(device, dtype, sample, negative_strides):
    call = sample(dtype)
    name, args, out = call.kernel()

    def to_numpy(value):
        if isinstance(value, (list, tuple)):
            return [to_numpy(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        if negative_strides and is_float(value) and value is not out and not is_fixed(value, call):
            dims = tuple(range(value.ndim))
            return value.flip(dims).numpy()[(slice(None, None, -1),) * len(dims)]
        return value.numpy()

    arrays = [to_numpy(a) for a in args]
    result = next(array for array, a in zip(arrays, args, strict=True) if a is out)
    expected = out.clone()
    result[...] = float("nan") if is_float(out) else 255
    getattr(_C, name)(*arrays)
    assert same_bits(torch.from_numpy(result), expected)


def is_fixed(value, call):
    return any(value.data_ptr() == t.data_ptr() for t in call.fixed)
