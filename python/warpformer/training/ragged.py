"""Lists of tokens, one after the other in one array."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Arrays of different lengths: `ragged[i]` is a view of the i-th.

    Attributes:
        values: [N] int32, of all.
        starts: [count + 1] int64, where each begins, and N.
    """

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, arrays: Iterable[Sequence[int]]) -> "Ragged":
        arrays = [np.asarray(array, np.int32) for array in arrays]
        lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
        values = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        return cls(values, np.concatenate([[0], lengths.cumsum()]))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[self.starts[index] : self.starts[index + 1]]
