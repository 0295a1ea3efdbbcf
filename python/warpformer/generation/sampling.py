"""The next token of each row, of its scores."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from warpformer import ops
from warpformer.generation.checks import is_integer, require
from warpformer.generation.config import OF_SAMPLING, GenerationConfig
from warpformer.generation.history import History
from warpformer.generation.philox import uniform
from warpformer.ops._recording import Repeated

AHEAD = 64  # numbers of a row that are made together


class Greedy:
    """The token of the greatest score, the first of several, whichever row it is of."""

    def __init__(self):
        self._best = Repeated(lambda scores: ops.sample(scores.flatten(0, -2)).view(scores.shape[:-1]))

    def __call__(self, scores: Tensor, index: Tensor | None = None) -> Tensor:
        """[R] of scores [R, V], or [R, K] of [R, K, V]."""
        return self._best(scores)

    def keep_(self, rows: Tensor):
        pass

    def count_(self, history: History):
        pass


class Sampler:
    """Draws the token of each row as `ops.sample` does, by a number u in [0, 1).

    u of a row's n-th token is that of counter n of Philox4x32-10 under the row's seed, so that a draw depends
    on the row's scores and nothing else.

    Args:
        seeds: [R, 2] uint64: a seed, and which of the sequences of this seed a row is.
        options: those of `ops.sample`, each a number or a tensor [R].

    Attributes:
        counts: [R] int64, numpy: tokens drawn of each row. Others may be set: the next token of a row is that
            of this counter.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3".
    """

    def __init__(self, seeds: np.ndarray, options: Mapping[str, float | Tensor] = MappingProxyType({})):
        self.seeds = seeds
        self.options = options
        self.counts = np.zeros(len(seeds), np.int64)
        self._first = self._numbers = None  # counters [R], and the numbers [R, AHEAD] from them on

    def __call__(self, scores: Tensor, index: Tensor | None = None) -> Tensor:
        """[R] of scores [R, V], or [R, K] of [R, K, V], for rows index[r] of the seeds, or for all."""
        rows = np.arange(len(self.seeds)) if index is None else index.cpu().numpy()
        options = self.options if index is None else selected(self.options, index)
        shape, scores = scores.shape[:-1], scores.flatten(0, -2)
        count = len(scores) // len(rows)
        if count > 1:
            repeated = torch.arange(len(rows), device=scores.device).repeat_interleave(count)
            options = selected(options, repeated)
        draws = torch.from_numpy(self.numbers(rows, count).ravel()).to(scores.device)
        self.counts[rows] += count
        return ops.sample(scores, draws, **options).view(shape)

    def numbers(self, rows: np.ndarray, count: int) -> np.ndarray:
        """[rows, count] float64: u of the next tokens of each."""
        if self._numbers is None or not self._are_ahead(rows, count):
            self._first = self.counts.copy()
            ahead = max(AHEAD, count)
            counters = (self.counts[:, None] + np.arange(ahead)).astype(np.uint64)
            seeds, streams = (self.seeds[:, i].repeat(ahead) for i in (0, 1))
            self._numbers = uniform(seeds, counters.ravel(), streams).reshape(-1, ahead)
        steps = self.counts[rows] - self._first[rows]
        return self._numbers[rows[:, None], steps[:, None] + np.arange(count)]

    def _are_ahead(self, rows, count):
        steps = self.counts[rows] - self._first[rows]
        return bool(((steps >= 0) & (steps + count <= self._numbers.shape[1])).all())

    def count_(self, history: History):
        """The next token of each row is the one behind `history`, whatever has been drawn."""
        self.counts = history.new.cpu().numpy().copy()

    def keep_(self, rows: Tensor):
        """Row r becomes what row rows[r] was."""
        index = rows.cpu().numpy()
        self.seeds, self.counts, self._numbers = self.seeds[index], self.counts[index], None
        self.options = selected(self.options, rows)


def selected(options: Mapping[str, float | Tensor], rows: Tensor) -> dict[str, float | Tensor]:
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in options.items()}


def sampling_options(config: GenerationConfig) -> dict[str, float]:
    """What `ops.sample` is asked for; temperature 0 where the best token is taken."""
    values = {name: getattr(config, name) for name in OF_SAMPLING}
    given = {name: value for name, value in values.items() if value is not None}
    return given | {"temperature": config.temperature if config.do_sample else 0.0}


def seeds_of(seed: int | Sequence[int] | None, rows: int, sequences: int) -> np.ndarray:
    """[rows sequences, 2] for a `Sampler`: `seed` + b of row b, or seed[b]; a random one if None."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    listed = isinstance(seed, Sequence)
    require(not listed or len(seed) == rows, f"there are {len(seed) if listed else 1} seeds of {rows} rows")
    values = [*seed] if listed else [seed]
    require(all(map(is_integer, values)), f"seed = {seed!r:.80} is not an integer, or one for each row")
    values = values if listed else [seed + row for row in range(rows)]
    seeds = np.array([value % 2**64 for value in values], dtype=np.uint64).repeat(sequences)
    return np.stack([seeds, np.tile(np.arange(sequences, dtype=np.uint64), rows)], 1)
