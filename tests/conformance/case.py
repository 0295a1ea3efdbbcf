"""One run of a micro-kernel with what must come out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Case:
    """`kernel` over `inputs` and `numbers`, its output starting as `output`, gives `expected`.

    Without `bound` the bits are equal, whatever computes them; with it, values differ by at most that much
    from the exact result, so two implementations by twice that. `needs` is what a GPU must be: "sm_80",
    "sm_90" or later, or "sm_90a" exactly.
    """

    name: str
    kernel: str
    output: np.ndarray
    expected: np.ndarray
    inputs: Sequence[np.ndarray] = ()
    numbers: Sequence[int] = ()
    bound: np.ndarray | None = None
    needs: str = "sm_80"

    def __str__(self):
        return self.name

    def run(self, library) -> np.ndarray:
        return library.run(self.kernel, self.inputs, self.output, self.numbers)

    def check(self, got: np.ndarray, expected: np.ndarray | None = None, times: float = 1) -> None:
        """AssertionError where `got` is not as expected, or not within `times` the bound of it."""
        expected = self.expected if expected is None else expected
        if self.bound is None:
            wrong = got.view(np.uint8) != expected.view(np.uint8)
            wrong = wrong.reshape(*got.shape, -1).any(-1)
        else:
            with np.errstate(invalid="ignore"):
                difference = np.abs(got.astype(np.float64) - expected)
                same = (got == expected) | (np.isnan(got) & np.isnan(expected))
                wrong = ~same & ~(difference <= times * self.bound)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{self.name}: {int(wrong.sum())} of {wrong.size} values are wrong, the first at {first}: "
                f"{got[first]!r} for {expected[first]!r}"
            )


def to_bf16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x, np.float32).astype(np.float16).view(np.uint16)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest tf32, ties away from zero."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)
