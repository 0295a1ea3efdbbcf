"""An engine's thread, and the process that it is in: nothing hangs, aborts or waits awake for nothing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import warpformer as wf

from .test_engine import make_llama

SCRIPT = """
import time
import warpformer as wf
from tests.generation.test_engine import make_llama

engine = wf.Engine(make_llama(layers=1))
slow = lambda token: time.sleep(0.1)
request = engine.submit([3, 4], max_new_tokens=10**6, eos_token_id=None, on_token=slow)
next(iter(request))
print("writes", flush=True)
"""
DRAIN = """
try:
    engine.close()
finally:
    assert request.result(0).reason == "cancelled"
"""
FORKED = """
import os
import signal
import torch

torch.set_num_threads(2)
torch.ones(10**6) + 1  # which leaves a thread that waits
{before}
child = os.fork()
if not child:
    signal.alarm(30)  # ends it if it hangs
    torch.set_num_threads(1)  # torch itself would wait for the parent's
    {after}
    model = make_llama(layers=1)
    torch.set_num_threads(2)
    with wf.Engine(model) as engine:
        tokens = engine.submit([3, 4], max_new_tokens=5, eos_token_id=None).result().tokens
    os._exit(len(tokens))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
"""
IMPORT = "import warpformer as wf; from tests.generation.test_engine import make_llama"
FORK = """
import os
import signal
import sys
child = os.fork()
if not child:
    signal.alarm(10)  # ends it if it hangs
    sys.exit(3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
"""
ENDS = {
    "the process ends": ("", 0),
    "a child ends": (FORK, 0),
    "a drain": (DRAIN, -signal.SIGINT),
    "a result": ("with engine: request.result()", -signal.SIGINT),
}


@pytest.mark.parametrize(("last", "code"), ENDS.values(), ids=ENDS)
def test_ctrl_c_and_the_end_of_a_process(last, code):
    """Nothing hangs, and nothing aborts."""
    command = [sys.executable, "-c", SCRIPT + last]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "writes\n"
            if code:
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
            errors = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == code, errors
    assert "terminate called" not in errors


@pytest.mark.parametrize("imported", ["before", "after"])
def test_an_engine_in_a_child(imported):
    """Where threads of the parent are not."""
    script = FORKED.format(**{"before": "", "after": "", imported: IMPORT})
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_threads_that_wait_end():
    """Those of the engine's maker, which would slow down the engine's. What comes later has new ones."""

    def come_to(count):
        """The threads of the process do, those that end in a moment."""
        for _ in range(500):
            if len(os.listdir("/proc/self/task")) == count:
                return True
            time.sleep(0.01)
        return False

    for thread in threading.enumerate():
        if thread.name == "warpformer.Engine":  # of a test before
            thread.join(10)
    time.sleep(0.05)
    torch.set_num_threads(2)
    try:
        a = torch.ones(10**6)
        assert (a + 1).sum() == 2e6
        before = len(os.listdir("/proc/self/task"))
        with wf.Engine(make_llama(layers=1)):
            assert come_to(before)  # its own, and one less
        assert come_to(before - 1)
        assert (a + 1).sum() == 2e6
        assert come_to(before)
    finally:
        torch.set_num_threads(1)
