from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from warpformer.generation.history import History


class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor): ...

    def end(self): ...


class Columns:
    """The new tokens of rows, as they come. A streamer gets columns [R], each when all rows have it that have
    not ended.

    Args:
        padding: behind the end of a row.
    """

    def __init__(self, rows: int, padding: int, streamer: Streamer | None):
        self.rows, self.padding, self.streamer = rows, padding, streamer
        self.parts: list[tuple] = []  # rows, places, tokens and log-probabilities
        self.waiting = [deque() for _ in range(rows)] if streamer is not None else []
        self.ended = [False] * rows

    def put(
        self,
        rows: Tensor,
        history: History,
        tokens: Tensor,
        log_probs: Tensor | None = None,
        ends: Tensor | None = None,
    ):
        """The last token of each of these rows, and whether they end with it; None: none does."""
        self.parts.append((rows, history.place, tokens) + (() if log_probs is None else (log_probs,)))
        if self.streamer is None:
            return
        ended = [False] * len(rows) if ends is None else ends.tolist()
        for row, token, end in zip(rows.tolist(), tokens.tolist(), ended, strict=True):
            self.waiting[row].append(token)
            self.ended[row] = end
        while any(self.waiting) and all(
            queue or ended for queue, ended in zip(self.waiting, self.ended, strict=True)
        ):
            column = [queue.popleft() if queue else self.padding for queue in self.waiting]
            self.streamer.put(torch.tensor(column))

    def stack(self) -> tuple[Tensor, Tensor | None]:
        """[R, new] tokens, and log-probabilities, 0 behind the end of a row."""
        rows, places, *values = zip(*self.parts, strict=True)
        columns = torch.cat([first + count for first, count in places])
        rows, *values = (torch.cat(tensors) for tensors in (rows, *values))
        shape = self.rows, int(columns.max()) + 1
        whole = [
            value.new_full(shape, fill).index_put_((rows, columns), value)
            for value, fill in zip(values, (self.padding, 0), strict=False)
        ]
        return whole[0], whole[1] if len(whole) > 1 else None
