"""The processes that train one model together, as torchrun starts them; one where there is no such group."""

import gc
import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed as dist

TIMEOUT = timedelta(minutes=30)  # the others wait while one writes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def total(*values: float) -> list[float]:
    """The sum of each over all processes, the same in each of them."""
    if world() == 1:
        return [*values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns in the first process, in all of them."""
    value = [make() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(value)
    return value[0]


@contextmanager
def process_group(device: str):
    """Joins the group that torchrun's environment describes, and yields the device of this process: with
    gloo the CPU, with nccl the GPU of its number on this machine."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield torch.device(device)
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield place
    finally:
        # The last owner of a group waits for its threads, DDP's Reducer with the GIL that they may need.
        gc.collect()
        dist.destroy_process_group()
