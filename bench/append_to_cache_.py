import pytest
import torch

from warpformer import ops

KV_HEADS, SLOTS, WIDTH = 8, 4096, 128


@pytest.mark.parametrize("tokens", [1, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_append(compare, tokens, dtype):
    lengths = torch.full((1,), SLOTS - tokens, dtype=torch.int32)
    rows = torch.arange(SLOTS - tokens, SLOTS)

    def inputs():
        new = torch.randn(2, 1, tokens, KV_HEADS, WIDTH, dtype=dtype)
        return *new, *torch.zeros(2, 1, SLOTS, KV_HEADS, WIDTH, dtype=dtype)

    def ours(key, value, k, v):
        ops.append_to_cache_(key, value, k, v, lengths)
        return k[:, rows], v[:, rows]

    def theirs(key, value, k, v):
        k.index_copy_(1, rows, key)
        v.index_copy_(1, rows, value)
        return k[:, rows], v[:, rows]

    compare(
        f"T {tokens}",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch": theirs},
        moved=4 * tokens * KV_HEADS * WIDTH * dtype.itemsize,
        flops=0,
        memory="copy",
    )
