"""What takes tokens out: their scores become -inf."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from warpformer.generation.history import PADDING, History


def without(scores: Tensor, tokens: Sequence[int], rows: Tensor | None = None) -> Tensor:
    """-inf for `tokens`, in those rows where `rows` [R] is; in all if None."""
    scores, tokens = scores.clone(), torch.tensor(tokens, device=scores.device)
    if rows is None:
        return scores.index_fill_(1, tokens, -torch.inf)
    scores[:, tokens] = scores[:, tokens].masked_fill(rows[:, None], -torch.inf)
    return scores


def forced(scores: Tensor, tokens: Sequence[int], rows: Tensor) -> Tensor:
    """0 for `tokens` and -inf for all others, in those rows where `rows` [R] is."""
    only = torch.full_like(scores[0], -torch.inf)
    only[list(tokens)] = 0
    return torch.where(rows[:, None], only, scores)


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
    return scores.masked_fill(banned[:, :-1], -torch.inf)


def by_length(words: Sequence[Sequence[int]] | None, eos: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    """The bad words of each length, without those that are one eos_token_id alone."""
    kept = {tuple(word) for word in words or ()} - {(token,) for token in eos}
    for length in sorted({len(word) for word in kept}):
        yield sorted(word for word in kept if len(word) == length)


def bad_words(history: History, scores: Tensor, words: Sequence[tuple[int, ...]]) -> Tensor:
    """No token that would complete one of the words, which have one length."""
    words = torch.tensor(words, device=scores.device)
    begins, ends = words[:, :-1], words[:, -1]
    length = begins.shape[1]
    if not length:
        return without(scores, ends.tolist())
    width = history.tokens.shape[1]
    if width < length:
        return scores
    begun = (history.tokens[:, None, width - length :] == begins).all(-1)  # [R, words]
    banned = torch.zeros_like(scores, dtype=torch.int32)
    banned.index_add_(1, ends, begun.int())
    return scores.masked_fill(banned > 0, -torch.inf)


def until_length(history: History, scores: Tensor, tokens: Sequence[int], length: int) -> Tensor:
    """None of `tokens` where a row has less than `length`."""
    return without(scores, tokens, history.lengths < length)


def until_new(history: History, scores: Tensor, tokens: Sequence[int], count: int) -> Tensor:
    """None of `tokens` where a row has less than `count` new ones."""
    return without(scores, tokens, history.new < count)


def forced_second(history: History, scores: Tensor, token: int) -> Tensor:
    """`token` where a row has one."""
    return forced(scores, [token], history.lengths == 1)


def forced_last(history: History, scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """One of `tokens` where the next one is the last."""
    return forced(scores, tokens, history.lengths == history.limits - 1)


def suppressed(history: History, scores: Tensor, tokens: Sequence[int]) -> Tensor:
    return without(scores, tokens)


def suppressed_first(history: History, scores: Tensor, tokens: Sequence[int], forced: bool) -> Tensor:
    """None of `tokens` as the first new one, or as the one after that which is forced."""
    first = (history.prompts == 1).long() if forced else 0
    return without(scores, tokens, history.new == first)
