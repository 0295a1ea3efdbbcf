"""Is the emulator right? Micro-kernels over every primitive of core/cuda, run on a GPU and in the emulator.

``python -m tests.conformance`` builds them for the GPU of this machine, runs every case and compares with
what must come out; ``--record`` also writes golden.json, with which every run of the tests, anywhere, then
compares the emulator.
"""

from collections.abc import Iterator

from tests.conformance.case import Case


def cases() -> Iterator[Case]:
    from tests.conformance import bulk_cases, matrix_cases, plain_cases, wgmma_cases

    yield from plain_cases.threads()
    yield from plain_cases.memory()
    yield from plain_cases.math()
    yield from matrix_cases.cases()
    yield from bulk_cases.cases()
    yield from wgmma_cases.cases()
