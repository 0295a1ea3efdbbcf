"""Shared and global memory, cp.async and atomics: their values, and the bugs they are used with."""

import pytest
import torch

from tests.emulator.plants import assert_caught, kernels, run
from warpformer import _emulated


@pytest.mark.parametrize("dtype", ["f32", "bf16", "i8"])
def test_every_access_moves_its_bytes(schedule, dtype):
    _emulated.set_schedule(schedule)
    torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "i8": torch.int8}[dtype]
    x = torch.randint(-100, 100, (128 * 16 * 4,)).to(torch_dtype)
    out = torch.zeros_like(x)
    getattr(kernels, f"move_{dtype}")(x, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("valid", [0, 4, 9])
def test_copy_ring(schedule, valid):
    _emulated.set_schedule(schedule)
    x, out = torch.randn(9, 256), torch.full((9, 256), torch.nan)
    kernels.copy_ring(x[: max(valid, 1)], out, valid)  # rows that are not valid are not there to read
    expected = x.view(9, 4, 64).flip(2).view(9, 256)
    expected[valid:] = 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize("grid", [1, 3, 9])
def test_histogram(schedule, grid):
    _emulated.set_schedule(schedule)
    x = torch.randint(0, 32, (3000,), dtype=torch.int32)
    counts = torch.zeros(2, 32, dtype=torch.int32)
    kernels.histogram(x, counts[0], counts[1], grid)
    assert torch.equal(counts, torch.bincount(x, minlength=32).int().expand(2, 32))


def test_atomics(schedule):
    _emulated.set_schedule(schedule)
    x = torch.randint(-1000, 1000, (128,), dtype=torch.int32)
    out = torch.tensor([0, -5000, 5000, 7, 0, -1, 0], dtype=torch.int32)
    total, wide = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    kernels.atomics(x, out, total, wide)
    assert out[:3].tolist() == [x.sum(), x.max(), x.min()]
    assert out[3] + out[4] == 7 + sum(range(128))  # every value was exchanged for the next
    assert 0 <= out[5] < 128
    assert out[6] == 1
    assert total == 256
    assert wide == 128 << 40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_add_pairs(schedule, dtype):
    _emulated.set_schedule(schedule)
    x, out = torch.randn(2, 64, dtype=dtype), torch.randn(64, dtype=dtype)
    orders = [(out + x[a]) + x[1 - a] for a in (0, 1)]  # each sum rounded
    kernels.add_pairs(x, out)
    assert ((out == orders[0]) | (out == orders[1])).all()


@pytest.mark.parametrize("resident", [1, 3])
def test_tickets_of_a_persistent_grid(schedule, resident):
    _emulated.set_schedule(schedule)
    _emulated.set_resident_blocks(resident)
    counter, taken = torch.zeros(1, dtype=torch.int32), torch.full((60,), -1, dtype=torch.int32)
    kernels.tickets(counter, taken, resident)
    assert counter == 60 + resident
    shares = torch.bincount(taken, minlength=resident)
    assert shares.sum() == 60
    if schedule != "fifo":  # which lets a block run as far as it can
        assert (shares >= 5).all()


def test_grid_barrier(schedule):
    _emulated.set_schedule(schedule)
    counter, values, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 4, 4))
    kernels.grid_barrier(counter, values, out)
    assert out.tolist() == [101, 102, 103, 100]


def test_a_grid_barrier_needs_every_block_resident(schedule):
    _emulated.set_schedule(schedule)
    counter, values, out = (torch.zeros(n, dtype=torch.int32) for n in (1, 5, 5))
    with pytest.raises(
        RuntimeError, match=r"grid_barrier: no progress(.|\n)*4 blocks are resident of 5"
    ) as e:
        kernels.grid_barrier(counter, values, out)
    assert "spin_until at tests/emulator/memory_kernels.cu" in str(e.value)


def test_tensors_of_an_earlier_call_are_out_of_bounds(schedule):
    x, _ = run("global_out_of_bounds", schedule, False)
    wide = torch.cat([x, x])  # in memory of its own
    kernels.global_out_of_bounds(wide, torch.empty(128), True)  # 4 elements further: still in `wide`
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernels.global_out_of_bounds(wide[:128], torch.empty(128), True)


PLANTS = {  # name: what is said, size of the tensors
    "shared_out_of_bounds": ("out of bounds: 4 bytes of shared memory from byte 512 on", 128),
    "shared_before_the_buffer": ("out of bounds: 4 bytes of shared memory from byte -4 on", 128),
    "shared_misaligned": ("misaligned: 16 bytes of shared memory", 128),
    "global_out_of_bounds": ("reads 4 bytes of global memory out of bounds", 128),
    "global_write_before": ("writes 4 bytes of global memory out of bounds", 128),
    "global_misaligned": ("misaligned: reads 16 bytes of global memory", 128),
    "uninitialised": ("byte 308 is uninitialised", 128),
    "race_of_warps": ("race: byte", 128),
    "race_in_a_word": ("race: byte 1 was written", 128),
    "plain_write_beside_atomic": ("race: byte 0", 64),
    "wrong_wait_count": ("still in flight", 128),
    "missing_commit": ("still in flight", 64),
    "missing_barrier_after_wait": ("race|uninitialised|still in flight", 64),
    "copy_over_what_is_read": ("race|still in flight", 192),
    "write_over_a_copy": ("writes .* still in flight", 64),
    "copy_in_flight_at_exit": ("still in flight when the thread returns", 64),
    "copy_out_of_bounds": ("out of bounds", 64),
    "spins_by_hand": ("no progress", 32),
}
REVERSED = ("uninitialised", "missing_barrier_after_wait")


@pytest.mark.parametrize("name", PLANTS)
def test_planted_bug_is_caught(schedule, name):
    message, size = PLANTS[name]
    assert_caught(name, schedule, message, size)


@pytest.mark.parametrize("name", PLANTS)
def test_without_the_bug_it_runs(schedule, name):
    size = PLANTS[name][1]
    x, out = run(name, schedule, False, size)
    if name in REVERSED:
        x = x.flip(0)
    if name == "copy_over_what_is_read":
        x = x.view(3, 64).flip(1).flatten()
    if name == "copy_out_of_bounds":
        x[60:] = 0
    assert torch.equal(out, x)


def test_shared_memory_begins_at_16_bytes_and_no_more():
    """Alignment beyond 16 holds in some schedules, so that relying on it fails in others."""
    x, out = run("assumes_alignment", "fifo", True, 32)
    assert torch.equal(out, x)
    assert_caught("assumes_alignment", "lifo", "uninitialised", 32)
