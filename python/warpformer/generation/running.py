"""The batch of an `Engine`: sequences that are being read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from warpformer.generation.checks import require
from warpformer.generation.request import Request
from warpformer.generation.writers import Writers, selected
from warpformer.nn import CacheFull, KVCache


class Running:
    """Requests that have begun. Their order is that of the sequences of the cache; those behind have not been
    read at all.

    Args:
        model: what is called.
        cache: of the requests; forks of it hold prefixes.
        max_batch, prefill_chunk: as `Engine` has them.

    Attributes:
        device: the model's, where it is called and what is written lies. Prompts wait on the host.
        forgotten: prefixes that are to go.
    """

    def __init__(self, model, cache: KVCache, max_batch: int, prefill_chunk: int):
        self.model = model
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.cache = cache
        self.cache.record_()
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.requests: list[Request] = []
        self.forgotten: list = []
        self._writers: dict[object, Writers] = {}
        self._prefixes: list = []

    # Who comes and goes

    def check_room(self, request: Request):
        """That the request has room in an empty cache."""
        blocks, limit = self._blocks(request.limit), self.cache.max_tokens
        most = None if limit is None else self._blocks(limit)
        require(
            most is None or blocks <= most,
            f"a prompt of {int(request.history.prompts)} tokens that may become {request.limit + 1} has no "
            f"room in a cache of max_tokens = {limit}",
        )

    def take(self, request: Request) -> bool:
        """Whether the request begins, which is to be the next one of the queue."""
        if len(self.requests) == self.max_batch:
            return False
        if not self._has_room(request):
            if self.requests:
                return False
            # Nobody will make room: prefixes have it.
            request.finish(error=CacheFull(f"prefixes leave {self.cache.free_tokens} tokens of the cache"))
            return True
        self.requests.append(request)
        return True

    def drop(self, waiting: Iterable[Request]):
        """Requests that are cancelled, and prefixes that are forgotten and that nobody is to begin with."""
        for request in self.requests:
            if request.cancelled:
                request.finish("cancelled")
        self._leave()
        if not self.forgotten:
            return
        needed = {request.prefix for request in (*self.requests[len(self.cache) :], *waiting)}
        going = [prefix for prefix in self.forgotten if prefix not in needed]
        for prefix in going:
            prefix.cache = None
        self._prefixes = [prefix for prefix in self._prefixes if prefix not in going]
        self.forgotten = [prefix for prefix in self.forgotten if prefix in needed]

    def clear(self):
        """Nothing is held any more."""
        self.requests, self._writers = [], {}
        self.cache.reorder_([])
        for prefix in self._prefixes:
            prefix.cache = None
        self._prefixes = []

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)

    def _has_room(self, request) -> bool:
        free = self.cache.free_tokens
        if free is None:
            return True
        free //= self.cache.block_size
        begun = len(self.cache)
        for tokens, other in zip(self.cache.tokens, self.requests[:begun], strict=True):
            free -= self._blocks(other.limit) - self._blocks(int(tokens))  # what they will still take
        return free >= sum(map(self._needs, (*self.requests[begun:], request)))

    def _needs(self, request) -> int:
        """Blocks that a request takes which has not been read."""
        blocks, prefix = self._blocks(request.limit), request.prefix
        if prefix is None:
            return blocks
        if prefix.is_read:
            return blocks - prefix.read // self.cache.block_size  # which the request never copies
        # What is left to read of the prefix, too, of whose last block there will be two.
        return blocks + 1 - self._blocks(prefix.read)

    def _leave(self):
        """Those that have ended."""
        going = [i for i, request in enumerate(self.requests) if not request.done]
        if len(going) == len(self.requests):
            return
        for key, writers in [*self._writers.items()]:
            writers.keep_(lambda request: not request.done)
            if not writers.requests:
                del self._writers[key]
        self.cache.reorder_([i for i in going if i < len(self.cache)])
        self.requests = [self.requests[i] for i in going]

    # A step

    def step(self):
        """A chunk of new prompts, and then a token more of all that write."""
        if len(self._begun) < len(self.requests) and not any(request.is_reading for request in self._begun):
            self._begin()
        if self._begun:
            self._guarded(self._begun, self._read_on)

    @property
    def _begun(self) -> list[Request]:
        return self.requests[: len(self.cache)]

    def _guarded(self, requests: Sequence[Request], call: Callable[[Sequence[Request]], None]):
        """What the model raises ends the requests that it was called with."""
        try:
            call(requests)
        except Exception as error:
            for request in requests:
                if not request.done:
                    request.finish(error=error)
        self._leave()

    def _read_on(self, requests):
        """Of all that have begun the next token, and of the first that is being read a chunk."""
        reading = next((request for request in requests if request.is_reading), None)
        if reading is None:
            logits = self._logits(self.cache, torch.tensor([[request.last] for request in requests]))
        else:
            rows = [self._next_tokens(request, request is reading) for request in requests]
            logits = self._logits(self.cache, *padded(rows))
        self._write(requests, logits)

    def _next_tokens(self, request, reads) -> Tensor:
        if reads:
            return self._chunk(request)
        if request.is_reading:
            return request.prompt[:0]
        return torch.tensor([request.last])

    def _chunk(self, request) -> Tensor:
        chunk = request.prompt[request.read : request.read + self.prefill_chunk]
        request.read += len(chunk)
        return chunk

    def _begin(self):
        """Requests that have not been read, with one prefix and as many as make up a chunk; or, before that,
        a chunk of the prefix."""
        first = self.requests[len(self.cache)]
        new, tokens = [], 0
        for request in self.requests[len(self.cache) :]:
            text = request.prompt if request.source is None else request.source
            tokens += min(len(text), self.prefill_chunk)
            if new and (tokens > self.prefill_chunk or request.prefix is not first.prefix):
                break
            new.append(request)
        is_ready = first.prefix is None or first.prefix.is_read
        self._guarded(new, self._read_first if is_ready else self._read_prefix)

    def _read_first(self, requests):
        prefix = requests[0].prefix
        fork = self.cache.fork([]) if prefix is None else prefix.cache.fork([0] * len(requests))
        rows = [self._chunk(request) for request in requests]
        sources = None if requests[0].source is None else [request.source for request in requests]
        try:
            logits = self._logits(fork, *padded(rows), sources)
            self.cache.join_(fork)
        finally:
            fork.reorder_([])  # also where an error keeps it
        self._write(requests, logits)

    def _read_prefix(self, requests):
        prefix = requests[0].prefix
        if prefix.cache is None:
            prefix.cache = self.cache.fork([])
            self._prefixes.append(prefix)
        try:
            self._logits(prefix.cache, prefix.tokens[None, prefix.read :][:, : self.prefill_chunk])
        except Exception:
            prefix.cache.reorder_([])  # which the error keeps
            prefix.cache = None
            self._prefixes.remove(prefix)
            raise

    def _logits(self, cache, ids: Tensor, mask=None, sources: Sequence[Tensor] | None = None) -> Tensor:
        """[R, V] of the last of the new tokens of each row, good until the next call; those of a row without
        any mean nothing."""
        ids, mask = self._there(ids, mask)
        if sources is not None:
            given = self._there(*padded(sources))
            logits = self.model(*given, decoder_input_ids=ids, cache=cache, logits_to_keep=1)
        elif hasattr(self.model, "encode"):
            logits = self.model(decoder_input_ids=ids, cache=cache, logits_to_keep=1)
        else:
            logits = self.model(ids, *() if mask is None else (mask,), cache=cache, logits_to_keep=1)
        return logits[:, -1]

    def _there(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return ids.to(self.device), None if mask is None else mask.to(self.device)

    def _write(self, requests, logits):
        """A token more of those whose prompts are read."""
        rows = {request: row for row, request in enumerate(requests)}
        new: dict[object, Writers] = {}
        for request in requests:
            if not request.is_reading and request.last is None:
                join(new, request.key, Writers(request))
        for writers in (*self._writers.values(), *new.values()):
            if writers.requests[0] in rows:
                writers.write(selected(logits, [rows[request] for request in writers.requests]))
        for key, writers in new.items():
            if writers.requests:
                join(self._writers, key, writers)


def join(groups: dict[object, Writers], key, writers: Writers):
    if key in groups:
        groups[key].join_(writers)
    else:
        groups[key] = writers


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """[R, T] of tokens, at the left, and where they are; None: everywhere."""
    lengths = [len(row) for row in rows]
    if min(lengths) == max(lengths):
        return torch.stack([*rows]), None
    ids = pad_sequence([*rows], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
