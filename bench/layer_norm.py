import math

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "residual"), [((32, 128, 384), True), ((8, 512, 1024), True), ((8, 512, 1024), False)]
)
def bench_layer_norm(compare, shape, residual, dtype):
    width = shape[-1:]
    weight, bias = torch.randn(2, *width, dtype=dtype)

    def ours(x, r=None):
        return ops.layer_norm(x, width, weight, bias, residual=r)

    def theirs(x, r=None):
        return F.layer_norm(x if r is None else x + r, width, weight, bias)

    compare(
        f"{list(shape)}" + " residual" * residual,
        dtype=dtype,
        inputs=lambda: tuple(torch.randn(1 + residual, *shape, dtype=dtype)),
        ours=ours,
        peers={"torch": theirs},
        moved=(2 + residual) * math.prod(shape) * dtype.itemsize,
        flops=(8 + residual) * math.prod(shape),
    )
