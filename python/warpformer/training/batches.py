"""Which examples are computed together."""

from itertools import pairwise

import numpy as np

from warpformer._C import InputError
from warpformer.training.objectives.objective import Objective, generator

POOL = 64  # batches whose examples are sorted by length together
ORDER = 1 << 63  # streams of random numbers that no example has


class Batches:
    """Batches of an epoch, of examples of about one length.

    Examples are shuffled, sorted by length within pools of about 64 batches, cut into batches of at most
    max_tokens, and these shuffled. Models compute no padding: what counts is the sum of lengths.

    Args:
        objective: whose examples they are.
        max_tokens: of a batch.
        seed: of the order, which is a function of it and the epoch; with `objective.seed` all that is random.
        rank: which of `world` processes this is. Each takes every world-th batch, and all as many: up to
            world - 1 of an epoch are left out, others in every epoch.
        world: how many processes there are.

    Raises:
        InputError: an example has more than max_tokens, or there are fewer batches than processes.
    """

    def __init__(self, objective: Objective, max_tokens: int, seed: int = 0, rank: int = 0, world: int = 1):
        self.lengths = objective.lengths()
        if self.lengths.max() > max_tokens:
            raise InputError(
                f"Batches: an example may have {self.lengths.max()} tokens, above max_tokens = {max_tokens}"
            )
        self.max_tokens = max_tokens
        self.seed = seed
        self.rank, self.world = rank, world

    def epoch(self, epoch: int) -> list[list[int]]:
        """Indices of the examples of each batch."""
        random = generator(self.seed, ORDER + epoch)
        order = random.permutation(len(self.lengths))
        pools = self.lengths[order].cumsum() // (POOL * self.max_tokens)
        order = order[np.lexsort([self.lengths[order], pools])]
        batches = [order[begin:end].tolist() for begin, end in self.cut(self.lengths[order])]
        shuffled = [batches[i] for i in random.permutation(len(batches))]
        count = len(shuffled) // self.world
        if not count:
            raise InputError(f"Batches: {len(batches)} batches for {self.world} processes")
        return shuffled[self.rank : count * self.world : self.world]

    def cut(self, lengths: np.ndarray) -> list[tuple[int, int]]:
        """Where batches begin and end."""
        ends, starts = lengths.cumsum(), [0]
        while starts[-1] < len(lengths):
            before = ends[starts[-1] - 1] if starts[-1] else 0
            starts.append(int(np.searchsorted(ends, before + self.max_tokens, side="right")))
        return list(pairwise(starts))
