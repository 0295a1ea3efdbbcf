"""Conversions and functions of the vectors, through the ops that do nothing else with a number."""

import pytest
import torch

from tests.check import same_bits
from warpformer import _C, ops

WIDTHS = pytest.mark.parametrize("width", [1, 16, 64])  # the tail of a register, and whole ones


def converted(values, to, width):
    """`values` as the dtype `to`: the sum of the rows of one table."""
    table = values.view(-1, width)
    out = torch.full(table.shape, torch.nan, dtype=to)
    _C.embedding_sum([torch.arange(len(table))], [table], out, 1)
    return out.flatten()


def assert_same_values(out, expected):
    assert torch.equal(out.isnan(), expected.isnan())
    assert same_bits(out[~out.isnan()], expected[~out.isnan()])


@WIDTHS
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_every_half_becomes_its_float(device, half, width):
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(half)
    assert_same_values(converted(values, torch.float32, width), values.float())


@WIDTHS
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_floats_round_to_nearest_even(device, half, width):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(half).float().view(torch.int32)
    near = (halves[:, None] + torch.tensor([-1, 0, 1])).flatten()
    # Halfway between two neighbours, and one bit beside it. The step of f16 is 2^13 floats, of bf16 2^16.
    half_step = 2**12 if half == torch.float16 else 2**15
    ties = (halves[:, None] + half_step + torch.tensor([-1, 0, 1])).flatten()
    anything = torch.randint(-(2**31), 2**31, (2**16,)).int()
    values = torch.cat([near, ties, anything]).view(torch.float32)
    assert_same_values(converted(values, half, width), values.to(half))


@WIDTHS
def test_exp_is_exact_to_the_last_bits(device, width):
    """softmax of (0, x) is e^x / (1 + e^x)."""
    x = torch.linspace(-87, 0, 2**14)
    rows = torch.stack([torch.zeros_like(x), x])
    truth = torch.softmax(rows.double(), 0)[1]
    padded = torch.cat([rows, torch.full((width, len(x)), -torch.inf)]).T  # to the width of a register
    error = (ops.softmax(padded)[:, 1].double() / truth - 1).abs().max()
    assert error < 4 * torch.finfo(torch.float32).eps
