from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from warpformer.generation.checks import require
from warpformer.generation.config import GenerationConfig
from warpformer.generation.history import History


def greatest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` greatest of each row [S, n], of equal ones the first first, and where they are."""
    values, index = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count], index[:, :count]


class Results(NamedTuple):
    """Beams of searches that have ended, the best first.

    Attributes:
        worths: [S, results] float32, -inf where there is none yet.
        sizes: [S, results] new tokens of each.
        tokens: [S, results, new].
        log_probs: [S, results, new] float32.
    """

    worths: Tensor
    sizes: Tensor
    tokens: Tensor
    log_probs: Tensor

    @staticmethod
    def none(searches: int, config: GenerationConfig, device) -> Results:
        worths = torch.full((searches, config.results), -torch.inf, device=device)
        sizes = torch.zeros_like(worths, dtype=torch.int64)
        return Results(worths, sizes, sizes[..., None][..., :0], worths[..., None][..., :0])

    def merged(self, others: Results, config: GenerationConfig) -> Results:
        """The best of both."""
        own = self.padded(others.tokens.shape[-1], config.padding)
        both = Results(*(torch.cat(pair, 1) for pair in zip(own, others, strict=True)))
        return both.best(config.results)

    def best(self, count: int) -> Results:
        index = greatest(self.worths, count)[1]
        of_tokens = index[..., None].expand(-1, -1, self.tokens.shape[-1])
        return Results(
            self.worths.gather(1, index),
            self.sizes.gather(1, index),
            self.tokens.gather(1, of_tokens),
            self.log_probs.gather(1, of_tokens),
        )

    def padded(self, length: int, padding: int) -> Results:
        """With tokens and log-probabilities up to this length."""
        missing = (0, length - self.tokens.shape[-1])
        tokens = F.pad(self.tokens, missing, value=padding)
        return self._replace(tokens=tokens, log_probs=F.pad(self.log_probs, missing))

    def select(self, searches: Tensor) -> Results:
        return Results(*(t[searches] for t in self))


def is_done(results: Results, scores: Tensor, history: History, config: GenerationConfig) -> Tensor:
    """[S] whether running beams of these scores [S, beams] can do no better than the results."""
    worst, best = results.worths[:, -1], scores[:, 0]
    is_full, is_dead = worst > -torch.inf, best == -torch.inf
    if config.early_stopping is True:
        return is_full | is_dead
    lengths = history.new
    if config.early_stopping == "never" and config.length_penalty > 0:
        lengths = history.limits - history.prompts
    lengths = lengths.view(scores.shape)[:, 0]
    return (is_full & (best / lengths**config.length_penalty <= worst)) | is_dead


def best_results(found: Sequence[tuple[Tensor, Results]], batch: int, config: GenerationConfig) -> Results:
    """Of each row the best num_return_sequences of its groups, [B num_return_sequences].

    Args:
        found: searches, of which search s is of row s % batch, and their results.
    """
    length = max(results.tokens.shape[-1] for _, results in found)
    parts = [results.padded(length, config.padding) for _, results in found]
    order = torch.cat([searches for searches, _ in found]).argsort()
    results = Results(*(torch.cat(tensors)[order] for tensors in zip(*parts, strict=True)))
    by_row = (t.unflatten(0, (-1, batch)).transpose(0, 1).flatten(1, 2) for t in results)
    best = Results(*by_row).best(config.num_return_sequences)
    require_choice(best.worths[:, 0])
    longest = int(best.sizes.masked_fill(best.worths == -torch.inf, 0).max())
    worths, sizes, tokens, log_probs = (t.flatten(0, 1) for t in best)
    # What has no worth is no result.
    none = (worths == -torch.inf)[:, None]
    tokens = tokens.masked_fill(none, config.padding)[:, :longest]
    return Results(worths, sizes, tokens, log_probs.masked_fill(none, 0)[:, :longest])


def require_choice(worths: Tensor):
    """That rows whose best result has this worth have any."""
    if not bool(worths.isfinite().all()):
        rows = (~worths.isfinite()).nonzero().flatten().tolist()
        require(False, f"the options leave no token to rows {rows[:8]}, or their logits are not finite")
