import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

ROWS, CLASSES = 2048, 32000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_cross_entropy(compare, dtype):
    """Forward and backward, as a step of training has it: the logits are read, their gradient is written."""

    def inputs():
        with torch.inference_mode(False):
            logits = torch.randn(ROWS, CLASSES, dtype=dtype).requires_grad_()
            return logits, torch.randint(CLASSES, (ROWS,))

    def gradient(function):
        def step(logits, target):
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(function(logits, target), logits)[0]

        return step

    compare(
        f"[{ROWS}, {CLASSES}] with gradient",
        dtype=dtype,
        inputs=inputs,
        ours=gradient(ops.cross_entropy),
        peers={"torch": gradient(F.cross_entropy)},
        moved=2 * ROWS * CLASSES * dtype.itemsize,
        flops=6 * ROWS * CLASSES,
        memory="copy",
    )
