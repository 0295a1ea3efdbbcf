import pytest
import torch

from warpformer import ops


@pytest.mark.parametrize("log_softmax", [False, True])
@pytest.mark.parametrize(("rows", "vocabulary", "k"), [(128, 32000, 8), (128, 58101, 8), (4, 128256, 8)])
def bench_top_k(compare, rows, vocabulary, k, log_softmax):
    """The best tokens of each beam."""

    def inputs():
        return (torch.randn(rows, vocabulary),)

    def theirs(scores):
        return tuple((scores.log_softmax(-1) if log_softmax else scores).topk(k))

    compare(
        f"[{rows}, {vocabulary}], k = {k}" + (", log_softmax" if log_softmax else ""),
        dtype=torch.float32,
        inputs=inputs,
        ours=lambda scores: ops.top_k(scores, k, log_softmax=log_softmax),
        peers={"torch": theirs},
        moved=4 * rows * vocabulary,
        flops=rows * vocabulary,
    )
