import math

import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 1024), (128, 30522)])
def bench_softmax(compare, shape, dtype):
    compare(
        f"{list(shape)}",
        dtype=dtype,
        inputs=lambda: (torch.randn(shape, dtype=dtype),),
        ours=ops.softmax,
        peers={"torch": lambda x: F.softmax(x, -1)},
        moved=2 * math.prod(shape) * dtype.itemsize,
        flops=4 * math.prod(shape),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def bench_softmax_out(compare, dtype):
    """Into memory of the caller, more than the caches hold."""
    shape = (8192, 1024)
    compare(
        f"{list(shape)} out=",
        dtype=dtype,
        inputs=lambda: tuple(torch.randn(2, *shape, dtype=dtype)),
        ours=lambda x, out: ops.softmax(x, out=out),
        peers={"torch": lambda x, out: torch.softmax(x, -1, out=out)},
        moved=2 * math.prod(shape) * dtype.itemsize,
        flops=4 * math.prod(shape),
        memory="copy",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def bench_attention_scores(compare, dtype):
    """The scores of BERT: 12 heads, 8 sentences of 256 tokens, scaled and padded."""
    batch, keys = 8, 256
    shape = (batch, 12, 256, keys)
    scale = 1 / math.sqrt(64)

    def inputs():
        keep = torch.arange(keys) < torch.randint(keys // 2, keys, (batch, 1))
        return torch.randn(shape, dtype=dtype), keep[:, None, None]

    compare(
        f"{list(shape)} scale mask",
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, keep: ops.softmax(x, mask=keep, scale=scale),
        peers={"torch": lambda x, keep: F.softmax((x * scale).masked_fill(~keep, -torch.inf), -1)},
        moved=2 * math.prod(shape) * dtype.itemsize + batch * keys,
        flops=6 * math.prod(shape),
    )
