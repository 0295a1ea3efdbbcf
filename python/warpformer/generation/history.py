from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -1
ROOM = 256  # columns for more tokens that a text gets at a time, or an eighth of it


class Text:
    """Columns of tokens that new ones are written behind, into the same memory.

    Attributes:
        tokens: [R, T or more] int64; PADDING from column `width` on.
        width: T.
    """

    def __init__(self, tokens: Tensor):
        self.tokens, self.width = tokens, tokens.shape[1]

    def extended(self, width: int, new: Sequence[Tensor] = (), more: bool = False) -> Text:
        """The first `width` columns and new tokens [R] behind them, with room for `more` if asked for: this
        text, where it ends there and has room."""
        text, end = self, width + len(new)
        if width < self.width or end + more > self.tokens.shape[1]:
            room = len(new) + more * max(ROOM, width // 8)
            text = Text(F.pad(self.tokens[:, :width], (0, room), value=PADDING))
        for column, tokens in enumerate(new, width):
            text.tokens[:, column] = tokens
        text.width = end
        return text


class History:
    """What the rows of a batch have so far. Rows are independent; `select` and `append` give new ones.

    Tokens that are appended are put beside the others when somebody asks for `tokens`: most steps of most
    texts do without.

    Attributes:
        tokens: [R, T] int64, the last at the right; PADDING before the first of a shorter row.
        lengths: [R] tokens of each row.
        prompts: [R] tokens of each row's prompt.
        limits: [R] the lengths at which rows end.
        log_probs: [R, new] of the new tokens, 0 of those that are none; None where nobody asks.
    """

    def __init__(
        self,
        tokens: Tensor,
        lengths: Tensor,
        prompts: Tensor,
        limits: Tensor,
        log_probs: Tensor | None = None,
    ):
        self.prompts, self.limits, self.log_probs = prompts, limits, log_probs
        # Before the first `_count` of `_appended` stand `_width` columns of `_text`.
        self._text, self._width, self._lengths = Text(tokens), tokens.shape[1], lengths
        self._appended: list[Tensor] = []  # shared by those that follow each other
        self._count = 0
        self._room: int | None = None  # of the rows without those that are appended
        self._first: Tensor | None = None
        self._first_new: Tensor | None = None

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

    @property
    def tokens(self) -> Tensor:
        self._settle()
        return self._text.tokens[:, : self._width]

    @property
    def written(self) -> tuple[Tensor, Tensor]:
        """`tokens` with PADDING behind them, and the columns [R] from which on they are new. What follows by
        `append` has both in the same memory, as long as there is room."""
        self._settle()
        self._text = self._text.extended(self._width, more=True)
        if self._first_new is None:
            self._first_new = self._width - self.new
        return self._text.tokens, self._first_new

    @property
    def lengths(self) -> Tensor:
        self._settle()
        return self._lengths

    @property
    def last(self) -> Tensor:
        """[R, 1] the last token of each row."""
        return self._appended[self._count - 1].unsqueeze(1) if self._count else self.tokens[:, -1:]

    @property
    def new(self) -> Tensor:
        """[R] new tokens of each row."""
        return self.lengths - self.prompts

    @property
    def place(self) -> tuple[Tensor, int]:
        """Which of the new tokens of each row the last one is: the sum of the two, [R]."""
        if self._first is None:
            self._first = self._lengths - self.prompts - 1
        return self._first, self._count

    @property
    def room(self) -> int:
        """Tokens that every row can have more before one is at its limit."""
        if self._room is None:
            self._room = min((self.limits - self._lengths).tolist(), default=0)
        return self._room - self._count

    def trimmed(self) -> History:
        """Without columns in which no row has a token."""
        longest = max(self.lengths.tolist(), default=0)
        return self._with(self.tokens[:, self.tokens.shape[1] - longest :])

    def with_log_probs(self) -> History:
        """With those of new tokens kept from here on."""
        return self._with(self.tokens, torch.zeros(len(self.tokens), 0, device=self.tokens.device))

    def select(self, index: Tensor) -> History:
        """Row r is what row index[r] is here."""
        log_probs = None if self.log_probs is None else self.log_probs[index]
        rows = (t[index] for t in (self.tokens, self.lengths, self.prompts, self.limits))
        return History(*rows, log_probs)

    def append(self, tokens: Tensor, log_probs: Tensor | None = None) -> History:
        """With one token [R] more of each row and, where they are kept, its log-probability [R]."""
        if self.log_probs is not None:
            log_probs = torch.cat([self.log_probs, log_probs[:, None]], 1)
        longer = History.__new__(History)
        longer.__dict__.update(self.__dict__, log_probs=log_probs)
        is_latest = len(self._appended) == self._count
        longer._appended = self._appended if is_latest else self._appended[: self._count]
        longer._appended.append(tokens)
        longer._count += 1
        return longer

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

    def _with(self, tokens, log_probs=None):
        log_probs = self.log_probs if log_probs is None else log_probs
        return History(tokens, self.lengths, self.prompts, self.limits, log_probs)

    def _settle(self):
        if self._count:
            self._text = self._text.extended(self._width, self._appended[: self._count])
            self._width, self._lengths = self._width + self._count, self._lengths + self._count
            self._room = None if self._room is None else self._room - self._count
            self._appended, self._count, self._first = [], 0, None
