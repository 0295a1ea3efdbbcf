"""Threads, collectives and barriers: their values, and the bugs they are used with."""

import pytest
import torch

from tests.emulator.plants import assert_caught, kernels, run
from warpformer import _emulated

NAN = torch.nan


def call(kernel, schedule, rows, *args, threads=128):
    _emulated.set_schedule(schedule)
    x = torch.randn(threads)
    out = torch.full((rows, threads), NAN)
    kernel(x, out, *args)
    return x, out


def test_shuffles(schedule):
    x, out = call(kernels.shuffles, schedule, 6)
    lane, warps = torch.arange(32), x.view(4, 32)
    expected = [
        warps[:, 5:6].expand(4, 32),
        warps.flip(1),
        warps[:, lane ^ 9],
        torch.cat([warps[:, :3], warps[:, :-3]], 1),
        torch.cat([warps[:, 17:], warps[:, 15:]], 1),
        (torch.arange(128.0).view(4, 32))[:, lane ^ 1],
    ]
    assert torch.equal(out, torch.stack(expected).view(6, 128))


@pytest.mark.parametrize("shift", [-10, 0, 10])
def test_votes(schedule, shift):
    _emulated.set_schedule(schedule)
    x = torch.randn(128) + shift
    out = torch.full((8, 128), NAN)
    kernels.votes(x, out)
    p = (x > 0).view(4, 32)
    assert torch.equal(out[0], p.flatten().float())
    assert torch.equal(out[1].view(4, 32), p.any(1, keepdim=True).expand(4, 32).float())
    assert torch.equal(out[2].view(4, 32), p.all(1, keepdim=True).expand(4, 32).float())
    block = [p.any().float(), p.all().float(), p.sum().float()]
    assert torch.equal(out[3:6], torch.stack(block)[:, None].expand(3, 128))
    assert torch.equal(out[6].view(4, 32).sum(1), torch.ones(4))
    assert torch.equal(out[7].view(4, 32), p.sum(1, keepdim=True).expand(4, 32).float())


@pytest.mark.parametrize("threads", [32, 96, 384, 1024])
def test_reductions(schedule, threads):
    x, out = call(kernels.reductions, schedule, 4, threads, threads=threads)
    warps = x.view(-1, 32)
    pairs = warps
    for _ in range(5):  # the order of addition of a butterfly
        half = pairs.shape[1] // 2
        pairs = pairs[:, :half] + pairs[:, half:]
    assert torch.equal(out[0].view(-1, 32), pairs.expand(-1, 32))
    assert torch.equal(out[1].view(-1, 32), warps.amax(1, keepdim=True).expand(-1, 32))
    torch.testing.assert_close(out[2, 0], x.sum())
    assert (out[2] == out[2, 0]).all()
    assert (out[3] == x.max()).all()


def test_a_nan_is_the_maximum(schedule):
    _emulated.set_schedule(schedule)
    x, out = torch.randn(64), torch.empty(4, 64)
    x[40] = NAN
    kernels.reductions(x, out, 64)
    assert out[3].isnan().all()
    assert not out[1, :32].isnan().any()


def test_every_schedule_gives_the_same_bits():
    torch.manual_seed(0)
    x = torch.randn(384)
    results = []
    for schedule in ("fifo", "lifo", "1", "2", "3"):
        _emulated.set_schedule(schedule)
        out = torch.empty(4, 384)
        kernels.reductions(x, out, 384)
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.parametrize("grid", [(1, 1), (5, 1), (3, 4), (100, 7)])
def test_every_block_runs_once(schedule, grid):
    _emulated.set_schedule(schedule)
    out = torch.full((grid[1] * grid[0], 2, 32), NAN)
    kernels.positions(out, *grid)
    block = torch.arange(float(grid[0] * grid[1]))[:, None, None]
    assert torch.equal(out, block * 1000 + torch.tensor([0.0, 100.0])[:, None] + torch.arange(32.0))


def test_an_empty_grid_launches_nothing():
    out = torch.full((64,), NAN)
    kernels.positions(out, 0, 1)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("grid", "threads", "shared"), [(1, 48, 0), (1, 1056, 0), (1, 0, 0), (1, 32, 300000)]
)
def test_an_impossible_launch_is_refused(grid, threads, shared):
    with pytest.raises(RuntimeError, match="launch of missing_barrier, grid 1 x 1"):
        kernels.launch(torch.zeros(8), torch.zeros(8), grid, threads, shared)


PLANTS = {  # name: what is said, size of the tensors
    "missing_barrier": ("uninitialised|race", 128),
    "missing_second_barrier": ("race", 128),
    "missing_sync_warp": ("uninitialised|race", 64),
    "sync_warp_for_block": ("uninitialised|race", 64),
    "shuffle_for_barrier": ("race", 32),
    "divergent_shuffle": ("divergent", 64),
    "divergent_barrier": ("divergent", 128),
    "shuffle_in_a_branch": ("deadlock", 64),
    "early_return": ("deadlock(.|\n)*28 threads have returned", 128),
    "producer_and_consumers": ("race|twice", 256),
    "named_barrier_counts_differ": ("barrier 1 is given (96|128) threads here and (96|128)", 128),
    "arrives_twice": ("twice", 64),
    "named_barrier_left_over": ("barrier 4 has 32 of 64 arrivals", 64),
}
REVERSED = (
    "missing_barrier",
    "sync_warp_for_block",
    "shuffle_for_barrier",
    "divergent_barrier",
    "early_return",
)

UNCHANGED = (
    "missing_sync_warp",
    "divergent_shuffle",
    "shuffle_in_a_branch",
    "arrives_twice",
    "named_barrier_left_over",
)


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(schedule, name):
    message, size = PLANTS[name]
    assert_caught(name, schedule, message, size)


@pytest.mark.parametrize("name", PLANTS)
def test_without_the_bug_it_runs(schedule, name):
    x, out = run(name, schedule, False, PLANTS[name][1])
    if name in REVERSED:
        assert torch.equal(out, x.flip(0))
    if name == "missing_second_barrier":
        torch.testing.assert_close(out, x.flip(0))
    if name == "producer_and_consumers":
        assert torch.equal(out[:192].view(2, 3, 32), x[:64].view(2, 1, 32).flip(2).expand(2, 3, 32))
    if name in UNCHANGED:
        assert torch.equal(out, x)
