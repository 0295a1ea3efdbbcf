"""Bulk copies against their definition, and the bugs they are used with."""

import pytest
import torch

from tests.conformance import bulk_cases
from tests.conformance.library import emulated
from tests.emulator.plants import SCHEDULES, assert_caught, kernels, run

CASES = list(bulk_cases.cases())
SIZE = 1024


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case):
    case.check(case.run(emulated()))


@pytest.mark.parametrize("case", [case for case in CASES if "swizzle128" in case.name], ids=str)
def test_delivery_at_any_time(case):
    library = emulated()
    for schedule in SCHEDULES:
        library.set_schedule(schedule)
        case.check(case.run(library))
    library.set_schedule("fifo")


def test_every_kernel_has_a_case():
    copies = {name for name in emulated().cases if name.startswith(("bulk", "tensor"))}
    assert copies == {case.kernel for case in CASES}


PLANTS = {  # what is said
    "tensor_load_expects_half": "-1024 bytes",
    "tensor_load_expects_more": "deadlock(.|\n)*16 bytes",
    "tensor_load_not_waited": "in flight|race|not landed|uninitialised",
    "tensor_load_misaligned": "tensor_load.*misaligned",
    "tensor_load_over_readers": "race",
    "barrier_init_not_fenced": "fence_barrier_init",
    "tensor_store_not_fenced": "fence_proxy_async",
    "tensor_store_not_synchronized": "race|uninitialised",
    "tensor_store_source_reused": "tensor_store",
    "tensor_store_not_waited": r"bulk_wait_read<0>\(\) is missing",
    "bulk_load_out_of_bounds": "bulk_load.*out of bounds",
    "bulk_load_of_odd_bytes": "no multiple of 16",
    "tensor_load_of_another_rank": "1 coordinates for a tensor map of 2 dimensions",
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(schedule, name):
    assert_caught(name, schedule, PLANTS[name], SIZE)


def test_a_forgotten_swizzle_gives_other_numbers(schedule):
    x, out = run("tensor_load_swizzled", schedule, True, SIZE)
    assert not torch.equal(out, x)


@pytest.mark.parametrize("name", [*PLANTS, "tensor_load_swizzled"])
def test_without_the_bug_all_is_well(schedule, name):
    x, out = run(name, schedule, False, SIZE)
    assert torch.equal(out, x)


REFUSED = {  # sizes, strides, box, span, what is said
    "inner stride": ((32, 4), (2, 64), (32, 4), 16, "the innermost stride is 1"),
    "outer stride": ((30, 4), (1, 30), (4, 4), 16, "multiples of 16 bytes"),
    "inner box": ((32, 4), (1, 32), (3, 4), 16, "the inner box is a multiple of 16 bytes"),
    "wide box": ((1024, 4), (1, 1024), (512, 4), 16, "1 to 256"),
    "swizzle too narrow": ((64, 4), (1, 64), (64, 4), 128, "swizzle's width"),
    "swizzle too wide": ((64, 4), (1, 64), (16, 4), 128, "swizzle's width"),
    "no size": ((0, 4), (1, 32), (32, 4), 16, "sizes are 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_map_is_refused(name):
    *arguments, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        kernels.make_map(torch.zeros(4096), *arguments)


def test_a_misaligned_tensor_is_refused():
    with pytest.raises(ValueError, match="the address is a multiple of 16"):
        kernels.make_map(torch.zeros(4096)[1:], (32, 4), (1, 32), (32, 4), 16)
