"""Who writes ahead in speculative decoding. Drafts change how many calls of the model a text takes, and never
a token of it."""

from collections.abc import Iterable
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
        self._texts: list[Text] | None = None

    def __call__(self, history: History, index: Tensor | None) -> Tensor:
        if self._texts is None:
            self._texts = [Text(self.size) for _ in history.lengths]
        elif index is not None:
            self._texts = [self._texts[i] for i in index.tolist()]
        drafts = []
        rows = zip(self._texts, history.tokens.cpu().numpy(), history.lengths.tolist(), strict=True)
        for text, row, length in rows:
            text.extend(row[len(row) - length + len(text) :].tolist())
            drafts.append(text.continued(self.count))
        # All of one width, though fewer may follow: calls of many widths would all be recorded.
        width = self.count if any(drafts) else 0
        padded = [draft + [PADDING] * (width - len(draft)) for draft in drafts]
        return torch.tensor(padded, dtype=torch.int64, device=history.lengths.device)


class Text:
    """Tokens, and behind which places some of them stand.

    Args:
        size: of the tokens that are looked up together, at most.
    """

    def __init__(self, size: int):
        self._tokens: list[int] = []
        self._places: list[dict[tuple, list[int]]] = [{} for _ in range(size)]  # behind n + 1 tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]):
        for token in tokens:
            end = len(self._tokens)
            for n, places in enumerate(self._places, 1):
                if n <= end:
                    places.setdefault(tuple(self._tokens[-n:]), []).append(end)
            self._tokens.append(token)

    def continued(self, count: int) -> list[int]:
        """What has followed the last tokens, `count` at most."""
        for n, places in reversed([*enumerate(self._places, 1)]):
            if found := places.get(tuple(self._tokens[-n:])):
                whole = (place for place in reversed(found) if place + count <= len(self._tokens))
                place = next(whole, found[0])
                return self._tokens[place : place + count]
        return []


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
