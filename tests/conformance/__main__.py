"""python -m tests.conformance [--record]"""

import argparse
import multiprocessing
import sys
from pathlib import Path

from tests.conformance import cases, golden
from tests.conformance.build import build, gpu, serves, target
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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--record", action="store_true", help="write golden.json")
    arguments = parser.parse_args()
    name, capability = gpu()
    path = build(target(capability))
    worker, results, failed, skipped = Worker(path), [], 0, 0
    for case in cases():
        if not serves(case.needs, capability):
            skipped += 1
            continue
        result = worker.run(case.name)
        if isinstance(result, str):
            failed += 1
            print(f"{case.name}: {result}", flush=True)
            worker.stop()
            worker = Worker(path)
            continue
        results.append((case, result))
        try:
            case.check(result)
        except AssertionError as error:
            failed += 1
            print(error, flush=True)
    worker.stop()
    print(f"{name}: {len(results)} cases ran, {failed} failed, {skipped} need another GPU")
    if arguments.record:
        golden.record(name, results)
        print(f"wrote {golden.PATH}")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
