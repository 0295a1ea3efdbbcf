import math

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 1024), (128, 30522)])
def bench_log_softmax(compare, shape, dtype):
    compare(
        f"{list(shape)}",
        dtype=dtype,
        inputs=lambda: (torch.randn(shape, dtype=dtype),),
        ours=ops.log_softmax,
        peers={"torch": lambda x: F.log_softmax(x, -1)},
        moved=2 * math.prod(shape) * dtype.itemsize,
        flops=4 * math.prod(shape),
        memory="copy",
    )
