"""The next token of each row, of its scores."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from warpformer import ops
from warpformer.generation.checks import is_integer, require
from warpformer.generation.config import OF_SAMPLING, GenerationConfig
from warpformer.generation.philox import uniform
from warpformer.ops._recording import Repeated

AHEAD = 256  # numbers of a row that are made together
NOTHING: Mapping = MappingProxyType({})
Written = tuple[Tensor, Tensor] | tuple[()]  # of a History, for penalties


class Greedy:
    """The token of the greatest score, the first of several, whichever row it is of.

    Args:
        penalties: those of `ops.sample`.
    """

    def __init__(self, penalties: Mapping[str, float] = NOTHING):
        self._best = Repeated(lambda scores, *written: chosen(scores, None, penalties, *written))

    def __call__(self, scores: Tensor, written: Written = (), index: Tensor | None = None) -> Tensor:
        """[R] of scores [R, V]; or [R, K] of [R, K, V]."""
        return self._best(scores, *written)

    def keep_(self, rows: Tensor):
        pass

    def count_(self, new: Tensor):
        pass


class Sampler:
    """Draws the token of each row as `ops.sample` does, by a number u in [0, 1).

    u of a row's n-th token is that of counter n of Philox4x32-10 under the row's seed, so that a draw depends
    on the row's scores and nothing else.

    Args:
        seeds: [R, 2] uint64: a seed, and which of the sequences of this seed a row is.
        options: those of `ops.sample`, penalties among them, each a number or a tensor [R].

    Attributes:
        counts: [R] int64, numpy: tokens drawn of each row.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3".
    """

    def __init__(self, seeds: np.ndarray, options: Mapping[str, float | Tensor] = NOTHING):
        self.seeds = seeds
        self.options = options
        self.counts = np.zeros(len(seeds), np.int64)
        self._first = self._numbers = None  # counters [R], and the numbers [R, AHEAD] from them on
        self._step: int | None = None  # the next of these, where it is the same of all rows
        self._draws = self._drawn = None  # of all rows, and what is drawn by them

    def __call__(self, scores: Tensor, written: Written = (), index: Tensor | None = None) -> Tensor:
        """[R] of scores [R, V]; or [R, K] of [R, K, V]; or [n] of
        what is of rows index[n]."""
        if index is not None:
            draws = self._numbers_of(index.cpu().numpy(), 1).to(scores.device)
            return chosen(scores, draws, selected(self.options, index), *written)
        draws = self._next_numbers(scores.shape[1] if scores.ndim == 3 else 1)
        if self._draws is None or self._draws.shape != draws.shape:
            self._draws = draws.to(scores.device, copy=True)
            self._drawn = self._by(self._draws)
        else:
            self._draws.copy_(draws, non_blocking=True)
        return self._drawn(scores, *written)

    def _by(self, draws):
        rows, count = draws.shape
        options = selected(self.options, torch.arange(rows).repeat_interleave(count))
        return Repeated(lambda scores, *written: chosen(scores, draws, options, *written))

    def _next_numbers(self, count):
        """[R, count] float64: u of the next tokens, which the rows then have."""
        if self._step is None or self._step + count > self._numbers.shape[1]:
            return self._numbers_of(np.arange(len(self.seeds)), count)
        self._step += count
        self.counts += count
        return self._numbers[:, self._step - count : self._step]

    def _numbers_of(self, rows, count):
        """[rows, count], of some of them."""
        steps = None if self._numbers is None else self.counts[rows] - self._first[rows]
        if steps is None or (steps < 0).any() or (steps + count > self._numbers.shape[1]).any():
            self._make_numbers(max(AHEAD, count))
            steps = self.counts[rows] - self._first[rows]
        self.counts[rows] += count
        self._find_step()
        return self._numbers[
            torch.from_numpy(rows)[:, None], torch.from_numpy(steps)[:, None] + torch.arange(count)
        ]

    def _make_numbers(self, ahead):
        self._first = self.counts.copy()
        counters = (self.counts[:, None] + np.arange(ahead)).astype(np.uint64)
        seeds, streams = (self.seeds[:, i].repeat(ahead) for i in (0, 1))
        self._numbers = torch.from_numpy(uniform(seeds, counters.ravel(), streams).reshape(-1, ahead))

    def count_(self, new: Tensor):
        """The next token of each row is the one behind new[r] new ones, whatever has been drawn."""
        self.counts = new.cpu().numpy().copy()
        self._find_step()

    def _find_step(self):
        self._step = None
        if self._numbers is not None and len(self.counts):
            first, *others = (self.counts - self._first).tolist()
            self._step = first if first >= 0 and all(step == first for step in others) else None

    def keep_(self, rows: Tensor):
        """Row r becomes what row rows[r] was."""
        index = rows.cpu().numpy()
        self.seeds, self.counts = self.seeds[index], self.counts[index]
        self._numbers = self._step = self._draws = None
        self.options = selected(self.options, rows)


def chosen(
    scores: Tensor,
    draws: Tensor | None,
    options: Mapping[str, float | Tensor],
    tokens: Tensor | None = None,
    first_new: Tensor | None = None,
) -> Tensor:
    """`ops.sample` of scores [..., V] and draws [R, K], of one for each token."""
    draws = None if draws is None else draws.flatten()
    found = ops.sample(scores.flatten(0, -2), draws, **options, tokens=tokens, first_new=first_new)
    return found.view(scores.shape[:-1])


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
