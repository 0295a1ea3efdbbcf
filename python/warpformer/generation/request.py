"""What `Engine.submit` returns: a sequence that is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Condition
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from warpformer.generation.history import History
from warpformer.generation.rules import Rules

if TYPE_CHECKING:
    from warpformer.generation.engine import Prefix


class Finished(NamedTuple):
    """What a request has given.

    Attributes:
        tokens: the new ones.
        reason: "stop", where eos_token_id, a stop string or a criterion ended it; "length"; or "cancelled".
    """

    tokens: list[int]
    reason: str


class Request:
    """A sequence that an `Engine` writes.

    Iteration gives its tokens as they come, from the first on, and raises what ended it if that was an error.
    All methods may be called from any thread.

    Attributes:
        prompt: [T] int64 of a decoder, behind its prefix.
        history: tokens of the sequence; the engine's alone.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        history: History,
        rules: Rules,
        *,
        source: torch.Tensor | None,
        prefix: Prefix | None,
        key,
        seed: np.ndarray | None,
        on_token: Callable[[int], object] | None,
        cancel: Callable[[], object],
    ):
        self.prompt = prompt
        self._length = len(prompt)
        self.history = history
        self.rules = rules
        self.source = source  # what the encoder reads
        self.prefix = prefix
        self.key = key  # requests of one key choose together
        self.seed = seed  # [1, 2] of a Sampler; None where nothing is drawn
        self.on_token = on_token
        self.read = 0  # tokens of the prompt that the model has read
        self.cancelled = False
        self._cancel = cancel
        self._tokens: list[int] = []
        self._reason: str | None = None
        self._error: BaseException | None = None
        self._changed = Condition()
        self._ended = Condition()  # apart: tokens do not wake those that wait for the end

    @property
    def is_reading(self) -> bool:
        """Whether tokens of the prompt are left to read."""
        return self.read < self._length

    @property
    def limit(self) -> int:
        """Tokens that the cache holds of it at most: the last one is not read."""
        return int(self.history.limits) - 1

    @property
    def last(self) -> int | None:
        """The last token, if there is one."""
        return self._tokens[-1] if self._tokens else None

    @property
    def done(self) -> bool:
        """Whether nothing more comes."""
        return self._reason is not None or self._error is not None

    def cancel(self):
        """Ends it before the next token; it keeps those that it has."""
        self.cancelled = True
        self._cancel()

    def result(self, timeout: float | None = None) -> Finished:
        """Waits for the end.

        Raises:
            TimeoutError: it has not come in `timeout` seconds.
            Exception: what ended the request, as a LogitsProcessor raised it.
        """
        with self._ended:
            if not self._ended.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended in {timeout} s")
        if self._error is not None:
            raise self._error
        return Finished(self._tokens.copy(), self._reason)

    def __iter__(self) -> Iterator[int]:
        count = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._tokens) > count or self.done)  # noqa: B023
                new = self._tokens[count:]
            yield from new
            count += len(new)
            if self.done and count == len(self._tokens):
                break
        if self._error is not None:
            raise self._error

    # Of the engine

    def put(self, token: int):
        with self._changed:
            self._tokens.append(token)
            self._changed.notify_all()
        if self.on_token is not None:
            self.on_token(token)

    def finish(self, reason: str | None = None, error: BaseException | None = None):
        with self._changed, self._ended:
            self._reason, self._error = reason, error
            self._changed.notify_all()
            self._ended.notify_all()
