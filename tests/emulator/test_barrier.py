"""mbarriers: rings of buffers, and the rules of phases and counts."""

import pytest
import torch

from tests.emulator.plants import assert_caught, kernels, run
from warpformer import _emulated

BUGS = {
    "no_wait_full": "uninitialised|race|still in flight",
    "no_wait_empty": "race|still in flight|has gone on to phase|deadlock",
    "wrong_phase": "uninitialised|race|still in flight",
    "empty_count": "deadlock(.|\n)*lacks 1 of 65 arrivals",
    "no_barrier_after_init": "race|has been initialised",
}


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_ring(schedule, steps):
    _emulated.set_schedule(schedule)
    x, out = torch.randn(steps, 64), torch.full((steps, 64), torch.nan)
    kernels.ring(x, out, 0)
    assert torch.equal(out, x.flip(1))


@pytest.mark.parametrize("bug", BUGS)
def test_bug_of_a_ring_is_caught(schedule, bug):
    number = 1 + list(BUGS).index(bug)
    assert_caught("ring", schedule, BUGS[bug], 8 * 64, (number, bug))


PLANTS = {
    "try_wait_loop": "deadlock(.|\n)*lacks 1 of 32 arrivals",
    "too_many_arrivals": "more arrivals than the 64",
    "one_arrival_left_over": "phase 1 of the barrier at shared byte 0 has 1 of 64 arrivals",
    "two_phases_late": "before this thread saw phase 0|deadlock",
    "not_initialised": "no barrier at shared byte 0 has been initialised",
    "misaligned_barrier": "misaligned",
    "bytes_never_come": "deadlock(.|\n)*128 bytes",
}
SIZE = {"not_initialised": 32, "misaligned_barrier": 32, "bytes_never_come": 32}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(schedule, name):
    assert_caught(name, schedule, PLANTS[name], SIZE.get(name, 64))


@pytest.mark.parametrize("name", PLANTS)
def test_without_the_bug_it_runs(schedule, name):
    x, out = run(name, schedule, False, SIZE.get(name, 64))
    if name == "try_wait_loop":
        x = x.view(2, 32).flip(1).flatten()
    assert torch.equal(out, x)
