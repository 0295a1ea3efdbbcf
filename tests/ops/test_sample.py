import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.check import same_bits
from warpformer import InputError, ops

NONE = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}


def kept(scores, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0):
    """float64 [V] probabilities of a row, as the contract has them: each option by a whole sort."""
    z = scores.double() / temperature
    if 0 < top_k < len(z):
        z = z.masked_fill(z < z.sort(descending=True).values[top_k - 1], -torch.inf)
    if top_p < 1:
        order = z.flip(0).sort(descending=True, stable=True).indices
        order = len(z) - 1 - order  # of equal ones the last first
        p = z.softmax(0)[order]
        z[order[(p.cumsum(0) - p) >= top_p]] = -torch.inf
    if min_p:
        z = z.masked_fill(z - z.max() < torch.tensor(min_p).double().log(), -torch.inf)
    if typical_p < 1:
        logs = z.log_softmax(0)
        there = logs > -torch.inf
        entropy = -(logs.exp() * logs)[there].sum()
        distance = (-logs - entropy).abs()
        near = distance.sort(stable=True)
        p = logs.exp()[near.indices].cumsum(0)
        last = min(int((p < typical_p).sum()), int(there.sum()) - 1)
        z = z.masked_fill(distance > near.values[last] + 1e-6, -torch.inf)
    return z.softmax(0)


def check_row(scores, most=None, **options):
    """Draws at the ends of every token's share, or of `most` shares, and finds that token: so no other one
    is kept."""
    p = kept(scores.float(), **options)
    end = p.cumsum(0)
    begin = end - p
    tokens = (p > 1e-5).nonzero()[:, 0]
    tokens = tokens[:: -(-len(tokens) // most) if most else 1]
    draws = torch.stack([begin[tokens] + 3e-6, end[tokens] - 3e-6], 1).flatten()
    found = ops.sample(scores.expand(len(draws), -1), draws, **options)
    assert found.tolist() == tokens.repeat_interleave(2).tolist()


OPTIONS = [
    {},
    {"temperature": 0.6},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 40},
    {"top_p": 0.03},
    {"top_p": 0.5},
    {"top_p": 0.97},
    {"min_p": 0.07},
    {"min_p": 1.0},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"temperature": 1.6, "top_k": 30, "top_p": 0.83, "min_p": 0.021, "typical_p": 0.93},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_kept(device, dtype, options, request):
    most = 20 if request.node.callspec.params["device"] == "emulated" else None
    for size, spread in ((1, 1.0), (17, 0.1), (256, 30.0), (257, 3.0), (700, 3.0)):
        torch.manual_seed(size)
        scores = (spread * torch.randn(size)).to(dtype)
        scores[1::9] = -torch.inf
        check_row(scores, most, **options)


@settings(deadline=None, max_examples=150)
@given(
    values=st.lists(st.sampled_from([-torch.inf, -40.0, -3.0, -0.0, 0.0, 1.0, 2.0]), min_size=1, max_size=40),
    repeats=st.integers(1, 20),
    top_k=st.integers(0, 9),
    top_p=st.sampled_from([0.137, 0.6131, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_equal_scores(values, repeats, top_k, top_p, min_p):
    """All that equal the last of top_k stay, and of those at the end of top_p the last ones."""
    scores = torch.tensor(values).repeat(repeats)
    if scores.max() > -torch.inf:
        check_row(scores, top_k=top_k, top_p=top_p, min_p=min_p)


def test_equal_distances():
    """What is as near to the entropy as the last of typical_p stays."""
    check_row(torch.tensor([0.0, 1.0, 2.0, 1.0, 0.0, 2.0]), typical_p=0.5)


@pytest.mark.parametrize("top_k", [1, 50, 299])
def test_scores_that_are_nearly_one(device, top_k):
    """Of one bin, and some of them the same distance from the best after rounding. All are drawn."""
    scores = 100 + 1e-5 * torch.randn(300)
    scores[:150] = 1e-6 * torch.randn(150) + 99.99
    least = scores.sort(descending=True).values[top_k - 1]
    draws = torch.linspace(0, 1 - 1e-9, 700, dtype=torch.float64)
    found = ops.sample(scores.expand(700, -1), draws, top_k=top_k)
    assert torch.equal(found.unique(), (scores >= least).nonzero()[:, 0])


def test_many_far_from_the_best(device, request):
    """Where the last bin, which has no end, is the one that is put in order."""
    most = 20 if request.node.callspec.params["device"] == "emulated" else None
    scores = -100 * torch.rand(3000)
    scores[17] = 0.5
    for options in ({"top_k": 2000}, {"top_p": 1 - 1e-7}, {"typical_p": 0.999}):
        check_row(scores, most, **options)


def test_the_best(device, dtype):
    scores = torch.randn(9, 1000).to(dtype)
    scores[:, 300] = scores[:, 700] = 9
    assert ops.sample(scores).tolist() == [300] * 9
    draws = torch.full((9,), 0.9, dtype=torch.float64)
    assert ops.sample(scores, draws, temperature=0, top_p=0.1).tolist() == [300] * 9


def test_options_of_each_row(device):
    scores, draws = torch.randn(len(OPTIONS) + 1, 500), torch.rand(len(OPTIONS) + 1, dtype=torch.float64)
    rows = [NONE | options for options in (*OPTIONS, {"temperature": 0.0})]
    columns = {name: torch.tensor([row[name] for row in rows]) for name in NONE}
    columns["min_p"] = columns["min_p"].double()
    together = ops.sample(scores, draws, **columns)
    alone = [ops.sample(scores[r, None], draws[r, None], **row) for r, row in enumerate(rows)]
    assert together.tolist() == torch.cat(alone).tolist()
    mixed = ops.sample(scores, draws, temperature=0.7, top_k=columns["top_k"])
    each = [ops.sample(scores, draws, temperature=0.7, top_k=row["top_k"])[r] for r, row in enumerate(rows)]
    assert mixed.tolist() == torch.stack(each).tolist()


def test_the_last_number_and_the_first(device):
    """Neither draws a token of probability 0."""
    scores = torch.full((2, 1000), 0.1)
    scores[:, 600:] = scores[:, 0] = -torch.inf
    draws = torch.tensor([1 - 2.0**-53, 0.0], dtype=torch.float64)
    assert ops.sample(scores, draws).tolist() == [599, 1]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("draws", [None, torch.rand(4, dtype=torch.float64)], ids=["best", "drawn"])
def test_rows_without_a_token(device, dtype, wrong, draws, request):
    """Refused where the op can see it; elsewhere -1."""
    scores = torch.randn(4, 300).to(dtype)
    scores[1, 299] = wrong
    scores[3] = -torch.inf
    draws = None if draws is None else draws.to(device)
    if request.node.callspec.params["device"] in ("emulated", "cuda"):
        assert (ops.sample(scores, draws) < 0).tolist() == [False, True, False, True]
        return
    with pytest.raises(InputError, match=r"sample: there is no token to rows \[1, 3\]"):
        ops.sample(scores, draws)


def reference(scores, tokens, first_new, repetition=1.0, frequency=0.0, presence=0.0):
    out = scores.double()
    for r, row in enumerate(tokens.tolist()):
        written = row[first_new[r] :]
        for v in {v for v in row if 0 <= v < scores.shape[1]}:
            x = out[r, v]
            x = x / repetition if x >= 0 else x * repetition
            out[r, v] = x - frequency * written.count(v) - presence * (v in written)
    return out


@pytest.mark.parametrize("width", [0, 1, 40])
@pytest.mark.parametrize(
    "options", [{"repetition": 1.3}, {"frequency": 0.4}, {"presence": -0.7}, [1.2, 0.3, 0.5]], ids=str
)
def test_penalize(device, dtype, width, options):
    if isinstance(options, list):
        options = dict(zip(("repetition", "frequency", "presence"), options, strict=True))
    scores = torch.randn(5, 33).to(dtype)
    scores[2, 7] = -torch.inf
    tokens, first_new = torch.randint(-1, 35, (5, width)), torch.tensor([0, 1, 7, 20, 40]).clamp(max=width)
    out = ops.penalize(scores, tokens, first_new, **options)
    assert out.dtype is torch.float32
    right = reference(scores, tokens, first_new, **options).float()
    torch.testing.assert_close(out, right, rtol=1e-6, atol=1e-6)
    same = scores.float().clone()
    assert ops.penalize(same, tokens, first_new, **options, out=same) is same
    assert same_bits(same, out)
    per_row = {name: torch.full((5,), value) for name, value in options.items()}
    assert same_bits(ops.penalize(scores, tokens, first_new, **per_row), out)


PENALTIES = {"repetition": 1.3, "frequency": torch.tensor([0.4, 0.0, 0.1, -0.2, 9.0]), "presence": 0.7}


@pytest.mark.parametrize("width", [0, 1, 40])
def test_penalties_of_a_choice(device, dtype, width):
    """A choice with penalties is one among the scores that `penalize` gives."""
    tokens, first_new = torch.randint(-1, 35, (5, width)), torch.tensor([0, 1, 7, 20, 40]).clamp(max=width)
    penalties = {name: torch.as_tensor(value).to(device) for name, value in PENALTIES.items()}
    penalties = {name: value if value.ndim else value.item() for name, value in penalties.items()}
    written = {"tokens": tokens, "first_new": first_new, **penalties}
    draws = torch.rand(5, dtype=torch.float64)
    for scores in (torch.randn(5, 33).to(dtype), torch.randn(33, 5).to(dtype).T):
        penalized = ops.penalize(scores, tokens, first_new, **penalties)
        for options in ({}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "typical_p": 0.9}):
            for u in (None, draws):
                found = ops.sample(scores, u, **options, **written)
                assert found.tolist() == ops.sample(penalized, u, **options).tolist()


def test_nothing():
    assert ops.sample(torch.empty(0, 7)).shape == (0,)
    empty = torch.empty(0, 7), torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    assert ops.penalize(*empty).shape == (0, 7)


def test_the_greatest_draw():
    """u total is rounded to the total."""
    scores = torch.zeros(3, 200)
    scores[:, 150:] = -torch.inf
    draws = torch.full((3,), math.nextafter(1.0, 0.0), dtype=torch.float64)
    assert ops.sample(scores, draws).tolist() == [149] * 3


def test_top_k_is_whole():
    with pytest.raises(InputError, match="top_k"):
        ops.sample(torch.zeros(1, 200), torch.zeros(1, dtype=torch.float64), top_k=0.5)
