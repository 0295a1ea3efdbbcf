"""ldmatrix, stmatrix, movmatrix and mma against their definition, and the bugs they are used with."""

import pytest
import torch

from tests.conformance import matrix_cases, plain_cases
from tests.conformance.library import emulated
from tests.emulator.plants import assert_caught, run

CASES = [*plain_cases.math(), *matrix_cases.cases()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    case.check(case.run(emulated()))


def test_every_kernel_has_a_case():
    kernels = {case.kernel for case in CASES}
    kinds = ("ldmatrix", "stmatrix", "movmatrix", "mma")
    fragments = {name for name in emulated().cases if name.startswith(kinds)}
    assert fragments <= kernels


PLANTS = {  # what is said
    "ldmatrix_misaligned": "ldmatrix.*(misaligned|multiple of 16)",
    "ldmatrix_out_of_bounds": "ldmatrix.*out of bounds",
    "ldmatrix_race": "race|uninitialised",
    "stmatrix_race": "race|uninitialised",
    "mma_divergent": "divergent",
}
# Inside shared memory and initialised: the numbers alone tell.
WRONG_ADDRESSES = ("ldmatrix_rows", "ldmatrix_swizzle")


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(schedule, name):
    assert_caught(name, schedule, PLANTS[name], 256)


@pytest.mark.parametrize("name", WRONG_ADDRESSES)
def test_a_wrong_address_gives_other_numbers(schedule, name):
    x, out = run(name, schedule, True, 256)
    assert not torch.equal(out, x.bfloat16().float())


@pytest.mark.parametrize("name", [*PLANTS, *WRONG_ADDRESSES])
def test_without_the_bug_all_is_well(schedule, name):
    x, out = run(name, schedule, False, 256)
    assert torch.equal(out, x.bfloat16().float())
