"""Draws: among the tokens that transformers leaves, with exact probabilities, by numbers of a row's own."""

import numpy as np
import pytest
import torch
import transformers

import warpformer as wf
from warpformer.generation.philox import philox, uniform
from warpformer.generation.sampling import AHEAD, Sampler, sampling_options, seeds_of

from .models import OPTIONS, new_tokens, prompts

WARPERS = {
    "temperature": "Temperature",
    "top_k": "TopK",
    "top_p": "TopP",
    "min_p": "MinP",
    "typical_p": "Typical",
}
FILTERS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.6},
    {"top_p": 0.001},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.95},
    {"temperature": 1.7, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
]


def options_of(**options):
    return sampling_options(wf.GenerationConfig(do_sample=True, **options))


def filtered(logits, **options):
    """The scores that transformers draws by."""
    for name, value in options.items():
        logits = getattr(transformers, f"{WARPERS[name]}LogitsWarper")(value)(None, logits)
    return logits


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_are_those_of_transformers(options):
    """A number in the midst of a token's share draws that token, if float32 can tell the share."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 97)
    logits[1, 10:] = -torch.inf
    for row, theirs in zip(logits, filtered(logits, **options), strict=True):
        p = theirs.double().softmax(0)
        tokens = (p > 1e-5).nonzero()[:, 0]
        draws = (p.cumsum(0) - p / 2)[tokens]
        found = wf.ops.sample(row.expand(len(tokens), -1), draws, **options_of(**options))
        assert torch.equal(found, tokens)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_distribution(options):
    """Chi-square of 20,000 draws, below its 0.999 quantile; what the filters take out never comes."""
    logits = torch.tensor([[0.5, -1.0, 2.0, 1.0, -torch.inf, 0.0, 0.4, -0.5]])
    scores, count = filtered(logits, **options), 20_000
    sampler = Sampler(seeds_of(0, count, 1), options_of(**options))
    found = sampler(logits.expand(count, -1)).bincount(minlength=8)
    expected = scores[0].double().softmax(0) * count
    there = expected > 0
    assert not found[~there].any()
    freedom = int(there.sum()) - 1
    statistic = ((found - expected)[there] ** 2 / expected[there]).sum()
    assert statistic <= {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46}[freedom]


def test_draws_of_one_seed_follow_the_distribution():
    """From one position to the next, and from one sequence to the next."""
    scores, count = torch.tensor([[0.5, 2.0, 1.0, 0.0]]), 4000
    expected = scores[0].double().softmax(0) * count
    one = Sampler(seeds_of(5, 1, 1))
    positions = torch.cat([one(scores) for _ in range(count)])
    sequences = Sampler(seeds_of(5, 1, count))(scores.expand(count, -1))
    for found in (positions, sequences):
        assert ((found.bincount(minlength=4) - expected) ** 2 / expected).sum() < 16.27


def test_philox_is_that_of_the_paper_and_of_dropout():
    zero, ones = np.zeros(1, dtype=np.uint64), np.full(1, 2**64 - 1, dtype=np.uint64)
    known = {  # of Random123's known answers
        "zeros": (philox(zero, zero, zero), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        "ones": (philox(ones, ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    }
    for words, right in known.values():
        assert words[0].tolist() == [*right]
    counters = np.arange(64, dtype=np.uint64)
    words = philox(np.full(64, 9, dtype=np.uint64), counters, np.zeros(64, dtype=np.uint64)).flatten()
    kept = wf.ops.dropout(torch.ones(256), 0.3, seed=9) != 0
    assert kept.tolist() == (words >= 0.3 * 2**32).tolist()
    numbers = uniform(counters, counters, counters)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()


def test_a_row_draws_by_its_own_counter():
    """Whatever has been drawn before, and wherever the row is."""
    seeds, scores = seeds_of(3, 3, 1), torch.randn(3, 50)
    straight = Sampler(seeds)
    expected = torch.stack([straight(scores) for _ in range(AHEAD + 3)], 1)
    jumping = Sampler(seeds, {"temperature": torch.ones(3), "top_p": 1.0})
    for counts in ([0, 1, 2], [AHEAD + 1, 0, 5], [AHEAD + 2, 1, 4], [7, 7, AHEAD]):
        jumping.count_(torch.tensor(counts))
        assert torch.equal(jumping(scores), expected[range(3), counts])
    some = torch.tensor([2, 0])
    jumping.count_(torch.tensor([3, 7, 6]))
    assert torch.equal(jumping(scores[some], index=some), expected[[2, 0], [6, 3]])
    assert jumping.counts.tolist() == [4, 7, 7]
    jumping.count_(torch.tensor([8, 8, AHEAD + 1]))
    jumping.keep_(torch.tensor([2, 0]))
    assert torch.equal(jumping(scores[[2, 0]]), expected[[2, 0], [AHEAD + 1, 8]])


SAMPLED = {"do_sample": True, "top_k": 40, "top_p": 0.9, "temperature": 1.3}


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_seed_gives_the_same_again(models, name):
    model, (ids, mask) = models(name)[0], prompts(name)
    found = [new_tokens(model, ids, mask, **SAMPLED, seed=seed) for seed in (1, 1, 2, -1, 2**64 + 1)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[4])
    for other in found[2:4]:
        assert found[0].shape != other.shape or not torch.equal(found[0], other)
    torch.manual_seed(7)
    first = new_tokens(model, ids, mask, **SAMPLED)
    torch.manual_seed(7)
    assert torch.equal(new_tokens(model, ids, mask, **SAMPLED), first)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_sequences_of_a_row(models, name):
    """Sequence j of a seed is the same however many there are, and in any batch."""
    model, (ids, mask) = models(name)[0], prompts(name)
    options = SAMPLED | OPTIONS | {"max_new_tokens": 8, "eos_token_id": None, "forced_eos_token_id": None}
    many = wf.generate(model, ids, mask, num_return_sequences=4, seed=[5, 5, 6], **options)
    assert many.shape[0] == 12
    assert len({tuple(row.tolist()) for row in many[:4, -8:]}) == 4
    few = wf.generate(model, ids, mask, num_return_sequences=2, seed=[5, 5, 6], **options)
    assert torch.equal(few, many[[0, 1, 4, 5, 8, 9]])
    alone = wf.generate(model, ids[2, mask[2].bool()][None], seed=6, **options)
    assert torch.equal(alone[0, -8:], many[8, -8:])


@pytest.mark.parametrize("options", [{}, SAMPLED, {"num_beams": 2}], ids=["greedy", "sampled", "beams"])
def test_where_no_token_is_left(models, options):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    with pytest.raises(wf.InputError, match=r"no token to rows \[0, 1, 2\]"):
        wf.generate(model, ids, mask, suppress_tokens=[*range(97)], **options)
