"""Who writes ahead in speculative decoding. Drafts change how many calls of the model a text takes, and never
a token of it."""

from typing import Protocol

import torch
from torch import Tensor

from warpformer.generation.checks import require
from warpformer.generation.decoding import Decoding
from warpformer.generation.history import PADDING, History
from warpformer.generation.prompts import longest_of


class Drafter(Protocol):
    def __call__(self, history: History, index: Tensor | None) -> Tensor:
        """Drafts [R, k] of what follows in each row, PADDING behind those of a row that has fewer. Row r is
        row index[r] of the call before, if `index` is given."""
        ...


class PromptLookup:
    """Drafts what has followed in the row where the same tokens stood before.

    The longest of the row's last tokens that it has already counts, `size` of them at most; of several places
    the last that `count` tokens follow, or the first.

    Args:
        count: of a draft, at most.
        size: max_matching_ngram_size.

    Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    def __init__(self, count: int, size: int):
        self.count = count
        self.size = size

    def __call__(self, history: History, index: Tensor | None) -> Tensor:
        tokens, width = history.tokens, history.tokens.shape[1]
        if width < 2:
            return tokens[:, :0]
        same = tokens[:, :-1] == tokens[:, -1:]  # [R, W - 1] the last token; then the last two...
        longest = same.long()
        for back in range(1, min(self.size, width - 1)):
            same = same[:, 1:] & (tokens[:, : width - 1 - back] == tokens[:, -1 - back, None])
            longest[:, back:] += same
        ends = torch.arange(width - 1, device=tokens.device)
        rank = torch.where(width - 1 - ends >= self.count, width + ends, width - ends)
        best = (longest * 2 * width + rank * (longest > 0)).max(1)
        places = best.indices[:, None] + torch.arange(1, self.count + 1, device=tokens.device)
        there = (places < width) & (best.values > 0)[:, None]
        return tokens.gather(1, places.clamp(max=width - 1)).masked_fill(~there, PADDING)


class DraftModel:
    """Drafts the likeliest tokens of a smaller model.

    A greedy draft has all its mass on one token, so to accept it with the probability p that the model gives
    it is the best that a scheme which keeps the distribution can do.

    Args:
        decoding: of the smaller model, at the prompts of the rows.
        count: of a draft, at most.
        vocabulary: of the larger model.

    Raises:
        InputError: the smaller model has another vocabulary.

    Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023).
    """

    def __init__(self, decoding: Decoding, count: int, vocabulary: int):
        self.decoding = decoding
        self.count = count
        self.vocabulary = vocabulary
        self.longest = longest_of(decoding.model)

    def __call__(self, history: History, index: Tensor | None) -> Tensor:
        if self.longest is not None:  # rows grow: where it once has no room it has none later
            self.count = min(self.count, self.longest + 1 - int(history.lengths.max()))
        if self.count < 1:
            return history.tokens[:, :0]
        logits = self.decoding.catch_up(history, index)
        require(
            logits.shape[1] == self.vocabulary,
            f"the vocabulary of assistant_model = {logits.shape[1]} is not that of model = {self.vocabulary}",
        )
        drafts = [logits.argmax(-1)]
        while len(drafts) < self.count:
            drafts.append(self.decoding.read(drafts[-1][:, None])[:, -1].argmax(-1))
        return torch.stack(drafts, 1)


def allowed(drafts: Tensor, history: History) -> Tensor:
    """Without what the limits of rows cut off: the model itself gives the token behind a draft."""
    room = (history.limits - history.lengths - 1)[:, None]
    drafts = drafts.masked_fill(torch.arange(drafts.shape[1], device=room.device) >= room, PADDING)
    return drafts[:, : int((drafts != PADDING).sum(1).max())]
