import math

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops
from warpformer.bench._compare import Graph

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 1024), (8192, 1024)])
def bench_rms_norm(compare, shape, dtype):
    """Into memory that a result has just left, or into `out` where it is larger than allocators keep."""
    weight = torch.randn(shape[-1], dtype=dtype)
    into = shape[0] == 8192

    def inputs():
        x, out = torch.randn(2, *shape, dtype=dtype)
        return x, out if into else None

    compare(
        f"{list(shape)}" + " out=" * into,
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, out: ops.rms_norm(x, shape[-1:], weight, out=out),
        peers={"torch": lambda x, out: F.rms_norm(x, shape[-1:], weight)},
        moved=2 * math.prod(shape) * dtype.itemsize,
        flops=5 * math.prod(shape),
        memory="copy",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def bench_rms_norm_pre_norm(compare, dtype):
    """What a pre-norm block does before each of its halves: the sum is the residual of the next."""
    shape = (4096, 1024)
    weight = torch.randn(shape[-1], dtype=dtype)

    def theirs(x, r):
        z = x + r
        return F.rms_norm(z, shape[-1:], weight, 1e-6), z

    compare(
        f"{list(shape)} residual, sum",
        dtype=dtype,
        inputs=lambda: tuple(torch.randn(2, *shape, dtype=dtype)),
        ours=lambda x, r: ops.rms_norm(x, shape[-1:], weight, 1e-6, residual=r, return_sum=True),
        peers={"torch": theirs},
        moved=4 * math.prod(shape) * dtype.itemsize,
        flops=6 * math.prod(shape),
        memory="copy",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4096, 8192])
def bench_rms_norm_backward(compare, rows, dtype):
    width = 1024
    weight = torch.randn(width, dtype=dtype)

    def inputs():
        x, grad = torch.randn(2, rows, width, dtype=dtype)
        return tuple(Graph(f, grad, x, weight) for f in (ours, theirs))

    def ours(x, weight):
        return ops.rms_norm(x, (width,), weight)

    def theirs(x, weight):
        return F.rms_norm(x, (width,), weight)

    compare(
        f"[{rows}, {width}] backward",
        dtype=dtype,
        inputs=inputs,
        ours=lambda ours, theirs: ours.gradients(),
        peers={"torch": lambda ours, theirs: theirs.gradients()},
        moved=3 * rows * width * dtype.itemsize,
        flops=12 * rows * width,
        memory="copy",
    )
