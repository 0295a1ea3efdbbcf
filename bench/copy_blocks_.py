import pytest
import torch

from warpformer import ops

BLOCKS, BLOCK_SIZE, KV_HEADS, WIDTH = 256, 32, 8, 64


@pytest.mark.parametrize("count", [1, 16])
def bench_copy_blocks(compare, count):
    """Last blocks of the keys of beams, 96 of 128 of which get one of their own."""
    order = torch.randperm(BLOCKS)
    old, new = order[:96], order[96:192]

    def inputs():
        return (torch.randn(BLOCKS, BLOCK_SIZE, KV_HEADS, WIDTH),)

    def ours(cache):
        ops.copy_blocks_(cache, old, new, count)
        return cache[new[:1]]

    def theirs(cache):
        first = cache[:, :count]
        first.index_copy_(0, new, first.index_select(0, old))
        return cache[new[:1]]

    compare(
        f"96 blocks, {count} tokens",
        dtype=torch.float32,
        inputs=inputs,
        ours=ours,
        peers={"torch": theirs},
        moved=2 * 4 * len(new) * count * KV_HEADS * WIDTH,
        flops=0,
        memory="copy",
    )
