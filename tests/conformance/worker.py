"""A process that runs the cases on the GPU: `python -m` gives its own module no name to start one by."""

import multiprocessing
from pathlib import Path

from tests.conformance import cases
from tests.conformance.library import Library

PATIENCE = 30  # seconds a case


def work(path: str, pipe) -> None:
    """Runs the cases whose names come through the pipe.

    In a process of its own: a kernel that fails or hangs takes the CUDA context with it.
    """
    library = Library(path)
    by_name = {case.name: case for case in cases()}
    pipe.send("ready")
    while name := pipe.recv():
        try:
            pipe.send(by_name[name].run(library))
        except RuntimeError as error:
            pipe.send(str(error))


class Worker:
    def __init__(self, path: Path):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=work, args=(str(path), other), daemon=True)
        self._process.start()
        other.close()
        if not self._pipe.poll(300) or self._pipe.recv() != "ready":
            raise RuntimeError("the process that runs the cases did not start")

    def run(self, name: str):
        """The output, or a string that says why there is none; the worker is then of no more use."""
        self._pipe.send(name)
        try:
            return self._pipe.recv() if self._pipe.poll(PATIENCE) else f"hangs for {PATIENCE} s"
        except EOFError:
            return "the process died"

    def stop(self):
        self._process.kill()
        self._process.join()
