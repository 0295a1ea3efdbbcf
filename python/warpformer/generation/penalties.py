"""What makes tokens that a row has less likely."""

import torch
import torch.nn.functional as F
from torch import Tensor

from warpformer.generation.history import History


def repetition(history: History, scores: Tensor, penalty: float) -> Tensor:
    """x / penalty of the tokens of a row where x >= 0, else penalty x.

    Source: Keskar et al., "CTRL: A Conditional Transformer Language Model for Controllable Generation".
    """
    index, scores = with_spare_column(history, scores)
    of_tokens = scores.gather(1, index)
    of_tokens = torch.where(of_tokens < 0, of_tokens * penalty, of_tokens / penalty)
    return scores.scatter_(1, index, of_tokens)[:, :-1]


def frequency(history: History, scores: Tensor, penalty: float) -> Tensor:
    """x - penalty (how often the token was written)."""
    index, scores = with_spare_column(history, scores, new_only=True)
    return scores.scatter_add_(1, index, scores.new_full((), -penalty).expand(index.shape))[:, :-1]


def presence(history: History, scores: Tensor, penalty: float) -> Tensor:
    """x - penalty of the tokens that were written."""
    index, scores = with_spare_column(history, scores, new_only=True)
    return scores.scatter_(1, index, scores.gather(1, index) - penalty)[:, :-1]


def with_spare_column(history: History, scores: Tensor, new_only: bool = False) -> tuple[Tensor, Tensor]:
    """`history.index`, and a copy of the scores with a column for what does not count."""
    return history.index(scores.shape[1], new_only), F.pad(scores, (0, 1))
