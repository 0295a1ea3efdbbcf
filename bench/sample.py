import pytest
import torch

from warpformer import ops

OPTIONS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


def torch_sample(scores, draws):
    """What transformers' loop does, with numbers that are given in the place of torch.multinomial's."""
    scores = scores.float() / OPTIONS["temperature"]
    scores = scores.masked_fill(scores < scores.topk(OPTIONS["top_k"]).values[:, -1:], -torch.inf)
    ascending, tokens = scores.sort()
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - OPTIONS["top_p"]
    cut[:, -1] = False
    scores = scores.masked_fill(torch.zeros_like(cut).scatter_(1, tokens, cut), -torch.inf)
    cumulative = scores.softmax(-1).double().cumsum(-1)
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]


CASES = {
    "best": ({}, lambda scores, _: scores.argmax(-1)),
    "top_k 50, top_p 0.9": (OPTIONS, torch_sample),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [32000, 128256])
@pytest.mark.parametrize("rows", [1, 32])
def bench_sample(compare, case, dtype, vocabulary, rows):
    """A step of decoding, of logits as trained models have them: few are near the greatest."""
    options, peer = CASES[case]

    def inputs():
        scores = (3 * torch.randn(rows, vocabulary)).to(dtype)
        return scores, torch.rand(rows, dtype=torch.float64)

    def ours(scores, draws):
        return ops.sample(scores, draws if options else None, **options)

    compare(
        f"[{rows}, {vocabulary}] {case}",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch": peer},
        moved=rows * vocabulary * dtype.itemsize,
        flops=rows * vocabulary,
        tolerance=1.0,  # bfloat16 has equal scores, of which torch.sort puts any first
    )
