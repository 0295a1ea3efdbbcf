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


WRITTEN, REPETITION = 1000, 1.1  # tokens of a row, and their penalty


def penalized(scores, draws, tokens):
    scores = scores.float()
    of_tokens = scores.gather(1, tokens)
    of_tokens = torch.where(of_tokens < 0, of_tokens * REPETITION, of_tokens / REPETITION)
    return torch_sample(scores.scatter(1, tokens, of_tokens), draws)


CASES = {
    "best": ({}, lambda scores, _, tokens: scores.argmax(-1)),
    "top_k 50, top_p 0.9": (OPTIONS, lambda scores, draws, tokens: torch_sample(scores, draws)),
    "repetition 1.1, top_k 50, top_p 0.9": (OPTIONS | {"repetition": REPETITION}, penalized),
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
        tokens = torch.randint(vocabulary, (rows, WRITTEN))
        return scores, torch.rand(rows, dtype=torch.float64), tokens

    first_new = torch.zeros(rows, dtype=torch.int64)

    def ours(scores, draws, tokens):
        written = {"tokens": tokens, "first_new": first_new} if "repetition" in options else {}
        return ops.sample(scores, draws if options else None, **options, **written)

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
