import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@DTYPES
@pytest.mark.parametrize(
    ("shape", "name"),
    [((32, 128, 1536), "gelu"), ((2048, 3072), "gelu"), ((2048, 3072), "gelu_tanh"), ((2048, 3072), "silu")],
)
def bench_bias(compare, shape, name, dtype):
    bias = torch.randn(shape[-1], dtype=dtype)
    compare(
        f"{list(shape)} {name} bias",
        dtype=dtype,
        inputs=lambda: (torch.randn(shape, dtype=dtype),),
        ours=lambda x: ops.activation(x, name, bias=bias),
        peers={"torch": lambda x: TORCH[name](x + bias)},
        moved=2 * math.prod(shape) * dtype.itemsize,
        flops=10 * math.prod(shape),
    )


@DTYPES
@pytest.mark.parametrize("name", ["silu", "gelu"])
def bench_gated(compare, name, dtype):
    rows, width = 2048, 3072

    def theirs(x):
        gate, up = x.chunk(2, -1)
        return TORCH[name](gate) * up

    compare(
        f"[{rows}, 2 x {width}] {name} gated",
        dtype=dtype,
        inputs=lambda: (torch.randn(rows, 2 * width, dtype=dtype),),
        ours=lambda x: ops.activation(x, name, gated=True),
        peers={"torch": theirs},
        moved=3 * rows * width * dtype.itemsize,
        flops=11 * rows * width,
    )


@DTYPES
@pytest.mark.parametrize(("name", "bias", "gated"), [("gelu", True, False), ("silu", False, True)])
def bench_backward(compare, name, bias, gated, dtype):
    rows, width = 2048, 3072
    columns = 2 * width if gated else width
    b = torch.randn(columns, dtype=dtype)

    def function(act):
        def gradients(x, grad):
            with torch.inference_mode(False), torch.enable_grad():
                leaves = [t.clone().requires_grad_() for t in ([b] if bias else [])]
                x = x.detach().requires_grad_()
                return torch.autograd.grad(act(x, *leaves), [x, *leaves], grad)[0]

        return gradients

    def ours(x, b=None):
        return ops.activation(x, name, gated=gated, bias=b)

    def theirs(x, b=None):
        z = x if b is None else x + b
        if not gated:
            return TORCH[name](z)
        gate, up = z.chunk(2, -1)
        return TORCH[name](gate) * up

    def inputs():
        with torch.inference_mode(False):
            return torch.randn(rows, columns, dtype=dtype), torch.randn(rows, width, dtype=dtype)

    compare(
        f"[{rows}, {columns}] {name}" + " gated" * gated + " bias" * bias + " forward and backward",
        dtype=dtype,
        inputs=inputs,
        ours=function(ours),
        peers={"torch": function(theirs)},
        # Forward reads and writes; backward reads both and writes the gradient.
        moved=(2 * columns + width + columns + width) * rows * dtype.itemsize,
        flops=30 * rows * width,
    )
