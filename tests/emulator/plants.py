"""Kernels with a bug that can be switched on, and what the emulator must say of it."""

import re
from pathlib import Path

import pytest
import torch

from warpformer import _emulated

FOLDER = Path(__file__).parent
SCHEDULES = ("fifo", "lifo", "1", "2", "3")
kernels = _emulated.kernels


def lines(name):
    """`thread_kernels.cu:41` of every line marked `caught: name`."""
    marked = re.compile(rf"// caught:(?: \w+)* {name}\b")
    return [
        f"{path.name}:{number}"
        for path in FOLDER.glob("*_kernels.cu")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marked.search(line)
    ]


def run(name, schedule, broken, size=128):
    _emulated.set_schedule(schedule)
    x = torch.randn(size)
    out = torch.full((size,), torch.nan)
    getattr(kernels, name)(x, out, broken)
    return x, out


def assert_caught(name, schedule, message, size=128):
    """The bug is reported, at one of its lines, with kernel, block, thread and schedule."""
    with pytest.raises(RuntimeError, match=message) as caught:
        run(name, schedule, True, size)
    report = str(caught.value)
    assert report.startswith(f"{name}: ")
    assert re.search(r"block \d+ of \d+", report)
    assert f"WARPFORMER_EMULATOR_SEED={schedule}" in report
    if lines(name):
        assert any(line in report for line in lines(name)), report
        assert re.search(r"thread \d+ \(warp \d+, lane \d+\)", report)
