import pytest
import torch
import torch.nn.functional as F

from warpformer import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True])
def bench_dropout(compare, residual, dtype):
    rows, width, p = 8192, 1024, 0.1

    # Their masks differ, so that neither returns its result to be compared with the other's.
    def ours(x, r=None):
        ops.dropout(x, p, residual=r)
        return rows

    def theirs(x, r=None):
        out = F.dropout(x, p)
        if r is not None:
            out += r
        return rows

    compare(
        f"[{rows}, {width}]" + " residual" * residual,
        dtype=dtype,
        inputs=lambda: tuple(torch.randn(1 + residual, rows, width, dtype=dtype)),
        ours=ours,
        peers={"torch": theirs},
        moved=(2 + residual) * rows * width * dtype.itemsize,
        flops=0,
    )
