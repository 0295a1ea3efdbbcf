"""The micro-kernels of this folder, built for the emulator or for a GPU, as functions of numpy arrays."""

import ctypes
from pathlib import Path

import numpy as np


class Library:
    """``run(case, inputs, output, numbers)`` over the C interface of entry.cu."""

    def __init__(self, path: str | Path):
        self._library = ctypes.CDLL(str(path))
        self._library.conformance_cases.restype = ctypes.c_char_p
        self.cases = self._library.conformance_cases().decode().split()

    def run(self, case: str, inputs=(), output=None, numbers=()) -> np.ndarray:
        """The output after the kernel, which starts from a copy of `output`; RuntimeError where it fails."""
        inputs = [np.ascontiguousarray(x) for x in inputs]
        result = _aligned_copy(output)
        inputs = [_aligned_copy(x) for x in inputs]
        message = ctypes.create_string_buffer(4096)
        failed = self._library.conformance_run(
            case.encode(),
            len(inputs),
            (ctypes.c_void_p * max(len(inputs), 1))(*[x.ctypes.data for x in inputs]),
            (ctypes.c_int64 * max(len(inputs), 1))(*[x.nbytes for x in inputs]),
            ctypes.c_void_p(result.ctypes.data),
            ctypes.c_int64(result.nbytes),
            len(numbers),
            (ctypes.c_int64 * max(len(numbers), 1))(*[int(x) for x in numbers]),
            message,
            ctypes.c_int64(len(message)),
        )
        if failed:
            raise RuntimeError(message.value.decode())
        return result

    def set_schedule(self, schedule: str) -> None:
        """The order of threads; the emulator's library alone."""
        self._library.conformance_set_schedule(schedule.encode())


def _aligned_copy(x: np.ndarray) -> np.ndarray:
    """At a multiple of 128 bytes, as cudaMalloc gives them."""
    x = np.ascontiguousarray(x)
    memory = np.empty(x.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 128
    copy = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def emulated() -> Library:
    """The cases that are part of the emulated extension."""
    from warpformer import _emulated

    return Library(_emulated.__file__)
