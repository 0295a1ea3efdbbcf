"""What ends a run from outside."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAME_SIGNAL = 3.0  # seconds


@contextmanager
def signals() -> Iterator[list[int]]:
    """Yields what has the first SIGINT or SIGTERM once it came. Another one interrupts, unless it follows at
    once, as where torchrun passes on what its processes got themselves."""
    caught, since = [], 0.0
    if threading.current_thread() is not threading.main_thread():
        yield caught  # which gets none
        return

    def note(number, frame):
        nonlocal since
        if caught and time.monotonic() - since > SAME_SIGNAL:
            raise KeyboardInterrupt
        if not caught:
            caught.append(number)
            since = time.monotonic()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
