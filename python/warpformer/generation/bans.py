"""What takes tokens out: their scores become -inf, where they are."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from warpformer.generation.history import PADDING, History


class Ban(NamedTuple):
    """The processor that gives -inf to `tokens`, in those rows where `where` [R] of a history is; in all if
    None."""

    tokens: Sequence[int]
    where: Callable[[History], Tensor] | None = None

    def __call__(self, history: History, scores: Tensor) -> Tensor:
        tokens = torch.tensor(self.tokens, device=scores.device)
        if self.where is None:
            return scores.index_fill_(1, tokens, -torch.inf)
        scores[:, tokens] = scores[:, tokens].masked_fill(self.where(history)[:, None], -torch.inf)
        return scores

    def meets(self, history: History, tokens: Tensor) -> Tensor:
        """[R, k] which of tokens [R, k] get -inf."""
        met = torch.isin(tokens, torch.tensor(self.tokens, device=tokens.device))
        return met if self.where is None else met & self.where(history)[:, None]


def forced(scores: Tensor, tokens: Sequence[int], rows: Tensor) -> Tensor:
    """0 for `tokens` and -inf for all others, in those rows where `rows` [R] is."""
    only = torch.full_like(scores[0], -torch.inf)
    only[list(tokens)] = 0
    return torch.where(rows[:, None], only, scores, out=scores)


def repeated_ngrams(history: History, scores: Tensor, size: int) -> Tensor:
    """No token that would end a sequence of `size` tokens which the row has already.

    Source: Paulus et al., "A Deep Reinforced Model for Abstractive Summarization", 2.5.
    """
    index = history.index(scores.shape[1])
    width = index.shape[1]
    if width < size:
        return scores
    windows = history.tokens.unfold(1, size, 1)
    begun = history.tokens[:, width - size + 1 :]
    again = (windows[..., :-1] == begun[:, None]).all(-1) & (windows != PADDING).all(-1)
    banned = torch.zeros(len(scores), scores.shape[1] + 1, dtype=torch.bool, device=scores.device)
    banned.scatter_(1, index[:, size - 1 :].where(again, scores.shape[1]), True)
    return scores.masked_fill_(banned[:, :-1], -torch.inf)


def by_length(words: Sequence[Sequence[int]] | None, eos: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """The bad words of each length, without those that are one eos_token_id alone."""
    kept = {tuple(word) for word in words or ()} - {(token,) for token in eos}
    for length in sorted({len(word) for word in kept}):
        yield sorted(word for word in kept if len(word) == length)


def ban_of_words(words: Sequence[tuple[int, ...]]) -> Callable[[History, Tensor], Tensor]:
    """The processor that takes out what would complete one of the words, which have one length."""
    if len(words[0]) == 1:
        return Ban([token for (token,) in words])
    return partial(bad_words, words=words)


def bad_words(history: History, scores: Tensor, words: Sequence[tuple[int, ...]]) -> Tensor:
    """No token that would complete one of the words, which have one length."""
    words = torch.tensor(words, device=scores.device)
    begins, ends = words[:, :-1], words[:, -1]
    length = begins.shape[1]
    width = history.tokens.shape[1]
    if width < length:
        return scores
    begun = (history.tokens[:, None, width - length :] == begins).all(-1)  # [R, words]
    banned = torch.zeros_like(scores, dtype=torch.int32)
    banned.index_add_(1, ends, begun.int())
    return scores.masked_fill_(banned > 0, -torch.inf)


def is_shorter(history: History, length: int) -> Tensor:
    """[R] whether a row has less than so many tokens."""
    return history.lengths < length


def has_fewer_new(history: History, count: int) -> Tensor:
    """[R] whether a row has less than so many new ones."""
    return history.new < count


def begins(history: History, forced: bool) -> Tensor:
    """[R] whether the next token is the first new one, or the one after that which is forced."""
    return history.new == ((history.prompts == 1).long() if forced else 0)


def forced_second(history: History, scores: Tensor, token: int) -> Tensor:
    """`token` where a row has one."""
    return forced(scores, [token], history.lengths == 1)


def forced_last(history: History, scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """One of `tokens` where the next one is the last."""
    return forced(scores, tokens, history.lengths == history.limits - 1)
