"""wgmma against its definition, and the bugs it is used with."""

import pytest
import torch

from tests.conformance import wgmma_cases
from tests.conformance.library import emulated
from tests.emulator.plants import SCHEDULES, assert_caught, kernels
from warpformer import _emulated

CASES = list(wgmma_cases.cases())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    case.check(case.run(emulated()))


@pytest.mark.parametrize("case", [case for case in CASES if "_64_" in case.name], ids=str)
def test_in_any_order_of_threads(case):
    library = emulated()
    for schedule in SCHEDULES:
        library.set_schedule(schedule)
        case.check(case.run(library))
    library.set_schedule("fifo")


def test_every_kernel_has_a_case():
    assert {name for name in emulated().cases if name.startswith("wgmma")} == {c.kernel for c in CASES}


PLANTS = {  # of the product: what is said
    "full_not_waited": "in flight|uninitialised|race",
    "empty_not_waited": "race|reads|arriv|read",
    "expects_half": "bytes|in flight|tensor_load|deadlock",
    "empty_expects_two": "deadlock",
    "accumulator_read_early": "uses an accumulator before its wgmma_wait",
    "accumulator_written_early": "accumulator 7 was written before its wgmma_wait",
    "released_early": "reads|read|race",
    "no_fence": r"no wgmma_fence\(\)",
    "no_commit": r"wgmma_commit\(\) is missing",
    "no_wait": "reads|read|wgmma_wait",
    "waits_too_little": "reads|read|race",
    "stride_of_zero": "descriptor of A: the stride offset is 0",
    "divergent_descriptor": "descriptor of A is not that of the warpgroup's first thread",
    "divergent_accumulate": "`accumulate` is not that of the warpgroup's first thread",
    "misplaced_start": "descriptor of A: the start is not where a pattern of the 128-byte swizzle",
    "other_width": "in flight in a wgmma of another shape",
}
WRONG_DESCRIPTORS = ("wrong_advance", "wrong_swizzle")  # the numbers alone tell
OPERANDS = {
    "operands_not_fenced": "fence_proxy_async",
    "operand_overwritten": "reads|read",
}


def product(name, schedule, broken, depth=128):
    _emulated.set_schedule(schedule)
    x = torch.randint(-4, 5, (2, 64, depth)).float()
    out = torch.full((64, 64), torch.nan)
    getattr(kernels, name)(x, out, broken)
    return x[0] @ x[1].T, out


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(schedule, name):
    assert_caught(name, schedule, PLANTS[name], 2 * 64 * 128)


@pytest.mark.parametrize("name", OPERANDS)
def test_planted_bug_of_the_operands_is_caught(schedule, name):
    assert_caught(name, schedule, OPERANDS[name], 64 * 64)


@pytest.mark.parametrize("name", WRONG_DESCRIPTORS)
def test_a_wrong_descriptor_gives_other_numbers(schedule, name):
    expected, out = product(name, schedule, True)
    assert not torch.equal(out, expected)


@pytest.mark.parametrize("name", [*PLANTS, *WRONG_DESCRIPTORS])
def test_without_the_bug_all_is_well(schedule, name):
    expected, out = product(name, schedule, False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", OPERANDS)
def test_without_the_bug_of_the_operands_all_is_well(schedule, name):
    expected, out = product(name, schedule, False, depth=8)
    assert torch.equal(out, expected)
