import math

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops
from warpformer.bench._compare import Graph

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "residual"),
    [((32, 128, 384), True), ((8, 512, 1024), True), ((4096, 1024), False), ((8192, 1024), False)],
)
def bench_layer_norm(compare, shape, residual, dtype):
    """Into memory that a result has just left, or into `out` where it is larger than allocators keep."""
    width = shape[-1:]
    weight, bias = torch.randn(2, *width, dtype=dtype)
    into = shape[0] == 8192

    def ours(x, r, out):
        return ops.layer_norm(x, width, weight, bias, residual=r, out=out)

    def theirs(x, r, out):
        return F.layer_norm(x if r is None else x + r, width, weight, bias)

    def inputs():
        x, r, out = torch.randn(3, *shape, dtype=dtype)
        return x, r if residual else None, out if into else None

    compare(
        f"{list(shape)}" + " residual" * residual + " out=" * into,
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch": theirs},
        moved=(2 + residual) * math.prod(shape) * dtype.itemsize,
        flops=(8 + residual) * math.prod(shape),
        memory="copy",
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4096, 8192])
def bench_layer_norm_backward(compare, rows, dtype):
    width = 1024
    weight, bias = torch.randn(2, width, dtype=dtype)

    def inputs():
        x, grad = torch.randn(2, rows, width, dtype=dtype)
        return tuple(Graph(f, grad, x, weight, bias) for f in (ours, theirs))

    def ours(x, weight, bias):
        return ops.layer_norm(x, (width,), weight, bias)

    def theirs(x, weight, bias):
        return F.layer_norm(x, (width,), weight, bias)

    compare(
        f"[{rows}, {width}] backward",
        dtype=dtype,
        inputs=inputs,
        ours=lambda ours, theirs: ours.gradients(),
        peers={"torch": lambda ours, theirs: theirs.gradients()},
        moved=3 * rows * width * dtype.itemsize,
        flops=16 * rows * width,
        memory="copy",
        tolerance=0.02 if dtype == torch.float32 else 0.3,  # torch adds the parameters' up in bfloat16
    )
