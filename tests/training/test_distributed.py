import os
import subprocess
import sys

import pytest
import torch

from tests.training.trainers import losses, read_log, weights, write_config


def test_two_processes_are_one_with_twice_the_accumulation(pairs, tmp_path):
    """With dropout: its seed is that of the micro-batch. Half of the run goes on from a checkpoint."""
    options = dict(max_tokens=400, eval_every=4, save_every=4)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def train(launcher, out, *arguments, **more):
        config = write_config(tmp_path / "run", pairs, **options | more)
        command = [*launcher, "warpformer", "train", str(config), "--out", str(tmp_path / out), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    train(torchrun, "two", accumulate=1, max_steps=4)
    said = train(torchrun, "two", "--resume", accumulate=1, max_steps=8)
    assert said.count("max_steps after step 8") == 1
    train([sys.executable, "-m"], "one", accumulate=2, max_steps=8)
    one, two = tmp_path / "one", tmp_path / "two"
    assert read_log(one, ["step", "epoch", "tokens"]) == read_log(two, ["step", "epoch", "tokens"])
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    found, expected = weights(two, 8), weights(one, 8)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
