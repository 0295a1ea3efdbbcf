from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class History:
    """What the rows of a batch have so far. Rows are independent; `select` and `append` give new ones.

    Attributes:
        tokens: [R, T] int64, the last at the right; PADDING before the first of a shorter row.
        lengths: [R] tokens of each row.
        prompts: [R] tokens of each row's prompt.
        limits: [R] the lengths at which rows end.
        log_probs: [R, new] of the new tokens, 0 of those that are none; None where nobody asks.
    """

    tokens: Tensor
    lengths: Tensor
    prompts: Tensor
    limits: Tensor
    log_probs: Tensor | None = None

    @staticmethod
    def of_prompts(
        input_ids: Tensor, attention_mask: Tensor | None, limits: Callable[[Tensor], Tensor]
    ) -> History:
        """Of prompts [B, T], of which those tokens count whose attention_mask is not 0; `limits` gives the
        limits of prompts of these lengths."""
        tokens = input_ids.long()
        lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        if attention_mask is not None:
            there, order = (attention_mask != 0).int().sort(dim=1, stable=True)
            tokens, lengths = tokens.gather(1, order).masked_fill(there == 0, PADDING), there.sum(1)
        return History(tokens, lengths, lengths, limits(lengths))

    def trimmed(self) -> History:
        """Without columns in which no row has a token."""
        longest = max(self.lengths.tolist(), default=0)
        return replace(self, tokens=self.tokens[:, self.tokens.shape[1] - longest :])

    def with_log_probs(self) -> History:
        """With those of new tokens kept from here on."""
        return replace(self, log_probs=torch.zeros(len(self.tokens), 0, device=self.tokens.device))

    @property
    def last(self) -> Tensor:
        """[R, 1] the last token of each row."""
        return self.tokens[:, -1:]

    @property
    def new(self) -> Tensor:
        """[R] new tokens of each row."""
        return self.lengths - self.prompts

    def select(self, index: Tensor) -> History:
        """Row r is what row index[r] is here."""
        log_probs = None if self.log_probs is None else self.log_probs[index]
        rows = (t[index] for t in (self.tokens, self.lengths, self.prompts, self.limits))
        return History(*rows, log_probs)

    def append(self, tokens: Tensor, log_probs: Tensor | None = None) -> History:
        """With one token [R] more of each row and, where they are kept, its log-probability [R]."""
        if self.log_probs is not None:
            log_probs = torch.cat([self.log_probs, log_probs[:, None]], 1)
        tokens = torch.cat([self.tokens, tokens[:, None]], 1)
        return History(tokens, self.lengths + 1, self.prompts, self.limits, log_probs)

    @staticmethod
    def joined(parts: Sequence[History], order: Tensor | slice = slice(None)) -> History:
        """Row r is row order[r] of the parts, one behind the other."""
        width = max(part.tokens.shape[1] for part in parts)
        tokens = [F.pad(part.tokens, (width - part.tokens.shape[1], 0), value=PADDING) for part in parts]
        others = ([getattr(part, name) for part in parts] for name in ("lengths", "prompts", "limits"))
        return History(*(torch.cat(tensors)[order] for tensors in (tokens, *others)))

    def ids(self, padding: int) -> Tensor:
        """`tokens`, with another padding."""
        return self.tokens.masked_fill(self.tokens == PADDING, padding)

    def index(self, vocabulary: int) -> Tensor:
        """`tokens` as columns of [R, V + 1]: the last is that of what does not count or cannot be written."""
        return self.tokens.where(self.tokens != PADDING, vocabulary).clamp(max=vocabulary)
