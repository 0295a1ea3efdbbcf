"""A Python of its own, for what depends on how a process starts."""

import os
import subprocess
import sys
import textwrap


def run(script, **environment):
    """What `script` prints; an AssertionError with what it wrote to stderr where it fails."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
