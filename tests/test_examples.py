"""The examples, on small data: each runs to its end and prints its figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    # On one thread: two that share a busy core wait for each other, at these sizes most of the time.
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def columns(output, row):
    """The numbers of a row of the table that an example prints."""
    return [float(number) for number in re.search(rf"^{row} (.*)", output, re.M)[1].replace("%", "").split()]


def test_torch_layers():
    output = run("torch_layers.py", "--steps", "30", "--width", "64", "--layers", "2")
    ours, theirs = (columns(output, name)[:3] for name in ("warpformer", "torch"))  # losses and accuracy
    assert ours == pytest.approx(theirs, abs=0.01)
    assert ours[1] < ours[0]
    assert ours[2] > 90


def test_hugging_face():
    output = run("hugging_face.py", "--width", "128", "--layers", "2", "--prompt", "32", "--new-tokens", "4")
    assert columns(output, "patched")[0] < 1e-4
    assert columns(output, "patched")[1] == 100
    assert 1e-4 < columns(output, "int8")[0] < 0.1


def test_classify():
    output = run("classify.py", "--small")
    assert columns(output, "the majority")[-1] < columns(output, "all-MiniLM, fine-tuned")[-1]
