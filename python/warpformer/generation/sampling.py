"""The next token of each row, of its scores."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from warpformer.generation.checks import is_integer, require
from warpformer.generation.philox import uniform


class Greedy:
    """The token of the greatest score, the first of several, whichever row it is of."""

    def __call__(self, scores: Tensor, index: Tensor | None = None) -> Tensor:
        """[R] of scores [R, V]."""
        greatest, tokens = scores.max(-1)
        require_choice(greatest)
        return tokens

    def keep_(self, rows: Tensor):
        pass


class Sampler:
    """Draws the token of each row with the probabilities softmax(scores): the first whose cumulative
    probability is above a number u in [0, 1).

    u of a row's n-th token is that of counter n of Philox4x32-10 under the row's seed, so that a draw depends
    on the row's scores and nothing else.

    Args:
        seeds: [R, 2] uint64: a seed, and which of the sequences of this seed a row is.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3".
    """

    def __init__(self, seeds: np.ndarray):
        self.seeds = seeds
        self.counts = np.zeros(len(seeds), dtype=np.uint64)  # tokens drawn for each row

    def __call__(self, scores: Tensor, index: Tensor | None = None) -> Tensor:
        """[R] of scores [R, V], for rows index[r] of the seeds, or for all."""
        require_choice(scores.amax(-1))
        cumulative = scores.double().softmax(-1).cumsum(-1)
        rows = slice(None) if index is None else index.cpu().numpy()
        draws = torch.from_numpy(uniform(self.seeds[rows, 0], self.counts[rows], self.seeds[rows, 1]))
        self.counts[rows] += np.uint64(1)
        draws = draws.to(scores.device)[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, draws, right=True)[:, 0]

    def keep_(self, rows: Tensor):
        rows = rows.cpu().numpy()
        self.seeds, self.counts = self.seeds[rows], self.counts[rows]


def require_choice(greatest: Tensor):
    """That rows whose greatest score is this have a token to choose."""
    if not bool(greatest.isfinite().all()):
        rows = (~greatest.isfinite()).nonzero().flatten().tolist()
        require(False, f"the options leave no token to rows {rows[:8]}, or their logits are not finite")


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
