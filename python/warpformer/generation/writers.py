"""Sequences of an `Engine` that choose their tokens together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from warpformer.generation.history import History
from warpformer.generation.request import Request


class Writers:
    """Requests of one key, which have the same options; one with a function of a user is alone.

    Attributes:
        history: of all of them, in order.
    """

    def __init__(self, request: Request):
        self.requests = [request]
        self.rules = request.rules
        self.history = request.history
        self.choose = self._chooser()

    def join_(self, other: Writers):
        self.requests += other.requests
        self.history = History.joined([self.history, other.history])
        if self.requests[0].seed is not None:
            self.choose = self._chooser()

    def keep_(self, stays: Callable[[Request], bool]):
        index = [i for i, request in enumerate(self.requests) if stays(request)]
        if len(index) < len(self.requests):
            rows = torch.tensor(index, dtype=torch.int64, device=self.history.lengths.device)
            self.requests = [self.requests[i] for i in index]
            self.history = self.history.select(rows).trimmed()
            self.choose.keep_(rows)

    def write(self, logits: Tensor):
        """A token more of each request, after logits [R, V]; finishes those that end. What raises ends the
        request that it is of, and no other."""
        try:
            scores = self.rules.scores(self.history, logits)
            tokens = self.choose(scores, self.rules.written(self.history))
            history = self.history.append(tokens)
            ends = self._ends(history)
        except Exception as error:
            if len(self.requests) == 1:
                self.requests[0].finish(error=error)
            else:
                self._write_alone(logits)
            return
        self.history = history
        for request, token, (stop, is_full) in zip(self.requests, tokens.tolist(), ends, strict=True):
            try:
                request.put(token)
            except Exception as error:  # of its on_token
                request.finish(error=error)
                continue
            if stop or is_full:
                request.finish("stop" if stop else "length")
        self.keep_(lambda request: not request.done)

    def _ends(self, history):
        """Of each row, whether something that stands there ends it, and whether its length does."""
        if not self.rules.may_end(history):
            return [(False, False)] * len(self.requests)
        stops, full = self.rules.stops(history), history.lengths >= history.limits
        return [*zip(stops.tolist(), full.tolist(), strict=True)]

    def _write_alone(self, logits):
        """Somebody has raised: each by itself."""
        parts = []
        for i, request in enumerate(self.requests):
            request.history = self.history.select(torch.tensor([i], device=self.history.lengths.device))
            parts.append(Writers(request))
            parts[-1].write(logits[i : i + 1])
        self.requests = []
        going = [part for part in parts if part.requests and not part.requests[0].done]
        if going:
            self.requests = [part.requests[0] for part in going]
            self.history = History.joined([part.history for part in going])
            self.choose = self._chooser()

    def _chooser(self):
        drawn = self.requests[0].seed is not None
        seeds = np.concatenate([request.seed for request in self.requests]) if drawn else None
        choose = self.rules.chooser(seeds)
        choose.count_(self.history.new)
        return choose


def selected(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows [R, V] of logits, those themselves where they are all in order."""
    if [*rows] == [*range(len(logits))]:
        return logits
    return logits[torch.tensor(rows, device=logits.device)]
