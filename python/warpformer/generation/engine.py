"""Many requests at once: continuous batching."""

from __future__ import annotations

import atexit
import logging
import os
import queue
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread, current_thread
from weakref import WeakSet

import torch
from tokenizers import Tokenizer
from torch import Tensor

from warpformer import _C
from warpformer.generation.checks import is_count, require
from warpformer.generation.config import GenerationConfig
from warpformer.generation.constraint import Constraint
from warpformer.generation.decoding import written_behind
from warpformer.generation.defaults import check_tokens, config_for
from warpformer.generation.generate import as_list
from warpformer.generation.processors import LogitsProcessor
from warpformer.generation.prompts import check_prompts
from warpformer.generation.request import Request
from warpformer.generation.rules import Rules
from warpformer.generation.running import Running
from warpformer.generation.sampling import seeds_of
from warpformer.generation.stopping import StoppingCriterion
from warpformer.nn import KVCache

log = logging.getLogger("warpformer")
SINGLE = ("num_beams", "num_return_sequences")
OPEN: WeakSet[Engine] = WeakSet()  # those whose threads may run
os.register_at_fork(after_in_child=OPEN.clear)  # where there are none
FORKED = 0x40  # PF_FORKNOEXEC, of the flags in /proc/self/stat


class Prefix:
    """A beginning that prompts share, of which an `Engine` computes keys and values once.

    Attributes:
        engine: whose requests may have it.
        tokens: [P] int64.
    """

    def __init__(self, engine: Engine, tokens: Tensor):
        self.engine = engine
        self.tokens = tokens
        self.cache: KVCache | None = None  # from its first use on

    @property
    def read(self) -> int:
        """Tokens that the cache holds."""
        return 0 if self.cache is None else int(self.cache.tokens.sum())

    @property
    def is_read(self) -> bool:
        return self.read == len(self.tokens)


class Engine:
    """Writes what many threads ask for, in one batch that requests join and leave at every step.

        with wf.Engine(model, max_batch=32) as engine:
            requests = [engine.submit(prompt, max_new_tokens=100) for prompt in prompts]
            for token in requests[0]: ...            # as they come
            tokens, reason = requests[1].result()

    A step calls the model with the next token of every sequence that writes, and with at most `prefill_chunk`
    tokens of prompts that are being read, first come, first served; a call before begins new prompts. A
    request gets the tokens that `generate` gives it alone. Borders of chunks are multiples of `prefill_chunk`
    from a prompt's first token behind its prefix, so that what is computed for a request does not depend on
    the others.

    A request begins when there is room for all that it may write: then nothing can stop it. Those that have
    no room wait in a queue, in their order.

    Args:
        model: as in `generate`, in eval mode. It is called in a thread of the engine's own, with the number
            of threads that torch has where the engine is made. Those that wait there for the maker's next
            computation end, and new ones come with it: no more should wait than there are cores.
        cache: from `model.make_cache`, where it is to be int8, or to have a limit `max_tokens`. It is the
            engine's.
        max_batch: sequences at once.
        max_waiting: requests in the queue, at most.
        prefill_chunk: tokens.

    Raises:
        InputError: an argument is not as said; the cache holds sequences.

    Source: Yu et al., "Orca" (2022), of batches that change at every step; Agrawal et al., "Sarathi" (2023),
    of prompts in chunks beside tokens.
    """

    def __init__(
        self,
        model,
        *,
        cache: KVCache | None = None,
        max_batch: int = 32,
        max_waiting: int = 256,
        prefill_chunk: int = 512,
    ):
        counts = dict(max_batch=max_batch, max_waiting=max_waiting, prefill_chunk=prefill_chunk)
        for name, value in counts.items():
            require(is_count(value, 1), f"{name} = {value!r} is not 1, 2...")
        self.model = model
        self.cache = model.make_cache() if cache is None else cache
        require(not len(self.cache), f"the cache holds {len(self.cache)} sequences")
        self.max_waiting = max_waiting
        self._running = Running(model, self.cache, max_batch, prefill_chunk)
        self._waiting: deque[Request] = deque()
        self._changed = Condition()
        self._closed = self._ended = False
        self._threads = torch.get_num_threads()
        self._thread = Thread(target=self._run, name="warpformer.Engine", daemon=True)
        if not is_forked():  # else it might wait for threads that the parent has
            _C.end_own_threads()
        OPEN.add(self)
        self._thread.start()

    def submit(
        self,
        input_ids: Sequence[int] | Tensor,
        *,
        prefix: Prefix | None = None,
        seed: int | None = None,
        logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
        stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] = (),
        tokenizer: Tokenizer | None = None,
        constraint: Constraint | None = None,
        on_token: Callable[[int], object] | None = None,
        block: bool = True,
        timeout: float | None = None,
        **options,
    ) -> Request:
        """Asks for the continuation of a prompt.

        Args:
            input_ids: [T] tokens of the prompt behind `prefix`, one at least; or what the encoder reads.
            prefix: from `prefix`.
            seed, logits_processor, stopping_criteria, tokenizer, constraint: as in `generate`; functions see
                this row alone, and are called by the engine's thread.
            on_token: called with each token, by the engine's thread, which waits for it.
            block, timeout: where the queue is full, wait for room, `timeout` seconds at most. The engine's
                thread, which makes room, never waits.
            options: those of `GenerationConfig`, for one sequence without beams.

        Raises:
            InputError: as in `generate`; the request can never have room in the cache; `prefix` is of
                another engine.
            queue.Full: there is no room in the queue.
            RuntimeError: the engine is closed.
        """
        request = self._request(
            input_ids,
            prefix,
            config_for(self.model, dict.fromkeys(SINGLE, 1) | options),
            (as_list(logits_processor), as_list(stopping_criteria), tokenizer, constraint),
            seed,
            on_token,
        )
        self._running.check_room(request)
        with self._changed:
            waits = block and current_thread() is not self._thread
            if not self._has_room() and not (
                waits and self._changed.wait_for(lambda: self._closed or self._has_room(), timeout)
            ):
                raise queue.Full(f"{len(self._waiting)} requests are waiting")
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def prefix(self, input_ids: Sequence[int] | Tensor) -> Prefix:
        """A beginning of prompts, for `submit`. Its keys and values are computed at the first use, and kept
        until `forget`.

        Raises:
            InputError: it has no token, or one outside the vocabulary; the model has an encoder.
        """
        require(not hasattr(self.model, "encode"), "a prefix is of decoder-only models")
        tokens = as_row(input_ids)
        check_prompts(self.model, tokens, None)
        return Prefix(self, tokens[0])

    def forget(self, prefix: Prefix):
        """The cache no longer holds the prefix, once the requests that have it are written."""
        with self._changed:
            self._running.forgotten.append(prefix)
            self._changed.notify_all()

    def close(self, cancel: bool = False):
        """Takes no more requests, and returns when all are written; or, with `cancel`, before the next token.
        Leaving a `with` block by an exception cancels, as do Ctrl-C while this waits, and the end of the
        process."""
        self._close(cancel)
        if self._thread is current_thread():
            return
        try:
            self._wait_for_end()
        except BaseException:
            self._close(cancel=True)
            self._wait_for_end()
            raise

    def _wait_for_end(self):
        # Not Thread.join: one that Ctrl-C interrupts takes the thread for ended, in Python before 3.13.
        with self._changed:
            self._changed.wait_for(lambda: self._ended)

    def _close(self, cancel):
        with self._changed:
            self._closed = True
            for request in (*self._waiting, *self._running.requests) if cancel else ():
                request.cancelled = True
            self._changed.notify_all()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind, *_):
        self.close(cancel=kind is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences in the batch."""
        return len(self._running.requests)

    def _has_room(self):
        return len(self._waiting) < self.max_waiting

    def _wake(self):
        with self._changed:
            self._changed.notify_all()

    def _request(self, input_ids, prefix, config: GenerationConfig, functions, seed, on_token) -> Request:
        for name in SINGLE:
            count = getattr(config, name)
            require(count == 1, f"{name} = {count}, and a request of an Engine is one sequence")
        for name in ("return_dict_in_generate", "prompt_lookup_num_tokens"):
            require(not getattr(config, name), f"{name} is not of an Engine")
        require(prefix is None or prefix.engine is self, "the prefix is of another Engine")
        ids = as_row(input_ids)
        check_prompts(self.model, ids, None)
        whole = ids if prefix is None else torch.cat([prefix.tokens[None], ids], 1)
        check_prompts(self.model, whole, None)
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if size is not None:
            check_tokens(config, size)
        there = whole.to(self._running.device)
        (prompt, _), history = written_behind(self.model, (there, None), (None, None), config)
        has_encoder = hasattr(self.model, "encode")
        alone = any(map(len, functions[:2]))
        options = repr(replace(config, max_new_tokens=None, max_length=None))  # the history has its limits
        return Request(
            (prompt.cpu() if has_encoder else ids)[0],
            history,
            Rules(config, *functions),
            source=ids[0] if has_encoder else None,
            prefix=prefix,
            key=object() if alone else (options, id(functions[2]), functions[3]),
            seed=seeds_of(seed, 1, 1) if config.do_sample else None,
            on_token=on_token,
            cancel=self._wake,
        )

    @torch.no_grad()
    def _run(self):
        torch.set_num_threads(self._threads)  # which torch holds for each thread
        try:
            while self._wait():
                self._running.step()
        except BaseException as error:
            log.exception("an Engine has failed")
            with self._changed:
                self._closed = True
                for request in (*self._waiting, *self._running.requests):
                    request.finish(error=error)
                self._waiting.clear()
                self._changed.notify_all()
        finally:
            try:
                self._running.clear()
            finally:
                with self._changed:
                    self._ended = True
                    self._changed.notify_all()

    def _wait(self) -> bool:
        """Waits for something to do, and lets requests begin; False where all is done."""
        with self._changed:
            while True:
                for request in [request for request in self._waiting if request.cancelled]:
                    self._waiting.remove(request)
                    request.finish("cancelled")
                self._running.drop(self._waiting)
                while self._waiting and self._running.take(self._waiting[0]):
                    self._waiting.popleft()
                self._changed.notify_all()  # there is room in the queue
                if self._running.requests:
                    return True
                if self._closed and not self._waiting:
                    return False
                self._changed.wait()


@atexit.register
def close_all():
    """A thread in the midst of a step would abort the process at its end."""
    for engine in [*OPEN]:
        if engine._thread.ident is not None:  # it has begun
            engine.close(cancel=True)


def is_forked() -> bool:
    """Whether the process is the child of a fork and has run no program since; True where nobody knows."""
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
    except OSError:
        return True
    return flags == 0 or bool(flags & FORKED)


def as_row(input_ids: Sequence[int] | Tensor) -> Tensor:
    """[1, T] int64."""
    ids = torch.as_tensor(input_ids).cpu()
    shape = f"{ids.dtype} {list(ids.shape)}"
    require(ids.ndim == 1 and not ids.is_floating_point(), f"input_ids = {shape} is not [T] of integers")
    return ids.long()[None].clone()
