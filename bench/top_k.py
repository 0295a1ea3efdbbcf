import pytest
import torch

from warpformer import ops


@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(128, 32000, 8), (128, 58101, 8), (4, 128256, 8)])
def bench_top_k(compare, rows, vocabulary, k):
    """The best tokens of each beam."""

    def inputs():
        return (torch.randn(rows, vocabulary),)

    compare(
        f"[{rows}, {vocabulary}], k = {k}",
        dtype=torch.float32,
        inputs=inputs,
        ours=lambda scores: ops.top_k(scores, k),
        peers={"torch": lambda scores: tuple(scores.topk(k))},
        moved=4 * rows * vocabulary,
        flops=rows * vocabulary,
    )
