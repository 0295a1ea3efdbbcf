import pytest
import torch

from warpformer import ops

WIDTH, EXPERTS, CHOSEN = 2048, 64, 6  # DeepSeek-V2-Lite's


def by_torch(ids):
    sorted_ids, order = ids.flatten().sort(stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(EXPERTS), right=True)
    return order, order.argsort().view(ids.shape), offsets.int()


@pytest.mark.parametrize("tokens", [1, 8, 512])
def bench_sort_by_expert(compare, tokens):
    compare(
        f"{tokens} tokens, {CHOSEN} of {EXPERTS} experts",
        dtype=torch.int64,
        inputs=lambda: (torch.randint(EXPERTS, (tokens, CHOSEN)),),
        ours=lambda ids: ops.sort_by_expert(ids, EXPERTS),
        peers={"torch": by_torch},
        moved=24 * tokens * CHOSEN + 4 * EXPERTS,
        flops=tokens * CHOSEN,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 512])
def bench_there_and_back(compare, tokens, dtype):
    """spread_rows and sum_rows, without experts between them."""
    order, places, _ = ops.sort_by_expert(torch.randint(EXPERTS, (tokens, CHOSEN)), EXPERTS)
    weights = torch.rand(tokens, CHOSEN)

    def ours(x):
        return ops.sum_rows(ops.spread_rows(x, order, places), weights, order, places)

    def theirs(x):
        rows = x.index_select(0, order // CHOSEN)
        return (rows[places].float() * weights[..., None]).sum(1).to(x.dtype)

    compare(
        f"{tokens} tokens to {CHOSEN} experts and back, width {WIDTH}",
        dtype=dtype,
        inputs=lambda: (torch.randn(tokens, WIDTH, dtype=dtype),),
        ours=ours,
        peers={"torch": theirs},
        moved=(2 + 2 * CHOSEN) * tokens * WIDTH * dtype.itemsize,
        flops=2 * tokens * CHOSEN * WIDTH,
    )
