import math

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "approximate"), [((32, 128, 1536), "none"), ((2048, 3072), "none"), ((2048, 3072), "tanh")]
)
def bench_gelu(compare, shape, approximate, dtype):
    bias = torch.randn(shape[-1], dtype=dtype)
    compare(
        f"{list(shape)} bias" + " tanh" * (approximate == "tanh"),
        dtype=dtype,
        inputs=lambda: (torch.randn(shape, dtype=dtype),),
        ours=lambda x: ops.gelu(x, approximate=approximate, bias=bias),
        peers={"torch": lambda x: F.gelu(x + bias, approximate=approximate)},
        moved=2 * math.prod(shape) * dtype.itemsize,
        flops=10 * math.prod(shape),
    )
