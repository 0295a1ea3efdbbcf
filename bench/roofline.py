"""What this machine can do at most: the memory and compute limits that every figure is a share of.

Of the device that `torch.device` makes the default. On a GPU they are measured by torch: its copy, and its
matrix product.
"""

import contextlib
import functools
import os
from pathlib import Path
from time import perf_counter

import torch

from warpformer import _C

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")  # worst to best
MEMORY = ("read", "copy")
COMPUTE = ("f32", "bf16", "int8")
GPU_LIMITS = ("copy", "f32", "bf16")
# Of twelve instructions: below a millisecond, which other processes seldom interrupt, and far above the
# microseconds that waking threads takes.
ROUNDS = 200_000
BEST_SECONDS, NOW_SECONDS = 0.15, 0.02


@contextlib.contextmanager
def isa(name):
    """Caps the ISA of the kernels at `name`; None leaves it."""
    before = _C.isa()
    _C.set_isa(name or before)
    try:
        yield
    finally:
        _C.set_isa(before)


def last_level_cache():
    """Bytes of the largest cache of the first CPU; 0 where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(s.read_text().strip().removesuffix("K")) * 1024 for s in sizes), default=0)


def on_gpu():
    return torch.get_default_device().type == "cuda"


@functools.cache
def past_cache():
    """Bytes that no cache of this machine holds a useful part of."""
    cache = torch.cuda.get_device_properties().L2_cache_size if on_gpu() else last_level_cache()
    return max(4 * cache, 256 << 20)


@functools.cache
def _memory():
    # Random all over: the system merges pages of equal content, which caches then hold.
    return torch.empty(past_cache() // 8, dtype=torch.int64).random_().view(torch.uint8)


def rate(limit, threads):
    """One short run of a limit: bytes or operations per second; 0 where the ISA in use has no such limit."""
    if on_gpu():
        return _gpu_rate(limit)
    memory = _memory()
    start = perf_counter()
    work = _C.roofline(limit, 1 if limit in MEMORY else ROUNDS, memory, threads)
    return work / (perf_counter() - start)


def _gpu_rate(limit):
    if limit not in GPU_LIMITS:
        return 0.0
    a, b, out = _gpu_operands(limit)
    torch.cuda.synchronize()
    start = perf_counter()
    if limit == "copy":
        out.copy_(a)
    else:
        torch.mm(a, b, out=out)
    torch.cuda.synchronize()
    return (2 * out.nbytes if limit == "copy" else 2 * len(a) ** 3) / (perf_counter() - start)


@functools.cache
def _gpu_operands(limit):
    if limit == "copy":
        a = torch.randn(1 << 28)
        return a, None, torch.empty_like(a)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[limit]
    return tuple(torch.randn(3, 8192, 8192).to(dtype))


def rate_now(limit, threads):
    """The best of a few runs: one is so short that waking its threads counts."""
    return _best_within(NOW_SECONDS, limit, threads)


def _best_within(seconds, limit, threads):
    best, end = rate(limit, threads), perf_counter() + seconds
    while best and perf_counter() < end:
        best = max(best, rate(limit, threads))
    return best


def best_rate(limit, threads):
    """The best of several runs, measured once per process."""
    return _best_rate(limit, threads, _C.isa())


@functools.cache
def _best_rate(limit, threads, _isa):
    return _best_within(BEST_SECONDS, limit, threads)


def binding(moved, flops, compute, threads, memory=None):
    """(limit, work): what keeps a kernel that moves `moved` bytes and computes `flops` from being faster,
    and which of the two numbers that limit is the rate of. `compute` is the limit of the operations, "f32"
    where the ISA in use lacks it; `memory` is that of the bytes, the faster one if None."""
    if memory is None or not best_rate(memory, threads):  # a GPU has no limit of reading alone
        memory = max(MEMORY, key=lambda limit: best_rate(limit, threads))
    compute = compute if best_rate(compute, threads) else "f32"
    if moved / best_rate(memory, threads) >= flops / best_rate(compute, threads):
        return memory, moved
    return compute, flops


def limits(threads):
    """Every limit of this machine on one and on `threads` threads, in GB/s or GFLOP/s (int8: GOP/s)."""
    if on_gpu():
        best = {limit: best_rate(limit, threads) for limit in GPU_LIMITS}
        return [
            {"limit": name, "isa": "cuda", "threads": 1, "giga_per_s": r / 1e9} for name, r in best.items()
        ]
    rows = []
    for name in ISAS[: ISAS.index(_C.best_isa()) + 1]:
        # Bandwidth hardly depends on the ISA: it is measured with the one in use.
        names = (MEMORY if name == _C.isa() else ()) + COMPUTE
        for limit in names:
            for n in sorted({1, threads}):
                with isa(name):
                    best = best_rate(limit, n)
                if best:
                    rows.append({"limit": limit, "isa": name, "threads": n, "giga_per_s": best / 1e9})
    return rows


def cores():
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0))
