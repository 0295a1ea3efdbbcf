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
    """`thread_kernels.cu:41` of every line that ends in `// caught: name` or follows a line of only that."""
    marked = re.compile(rf"// caught:(?: \w+)* {name}\b")
    return [
        f"{path.name}:{number + line.lstrip().startswith('//')}"
        for path in FOLDER.glob("*_kernels.cu")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marked.search(line)
    ]


def run(name, schedule, bug, size=128):
    _emulated.set_schedule(schedule)
    x = torch.randn(size)
    out = torch.full((size,), torch.nan)
    getattr(kernels, name)(x, out, bug)
    return x, out


def assert_caught(name, schedule, message, size=128, bug=(True, None)):
    """The bug is reported, at one of its lines, with kernel, block, thread and schedule.

    `bug` is what switches it on, and its name where that is not the kernel's.
    """
    switch, bug = bug
    with pytest.raises(RuntimeError, match=message) as caught:
        run(name, schedule, switch, size)
    report = str(caught.value)
    assert report.startswith(f"{name}: ")
    assert re.search(r"block \d+ of \d+", report)
    assert f"WARPFORMER_EMULATOR_SEED={schedule}" in report
    marked = lines(bug or name)
    if marked:
        assert any(re.search(rf"{line}\b", report) for line in marked), report
        assert re.search(r"thread \d+ \(warp \d+, lane \d+\)", report)
