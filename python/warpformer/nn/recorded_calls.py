from collections.abc import Callable
from dataclasses import replace
from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from warpformer.nn.sequences import Sequences
from warpformer.ops._library import autocast_dtype, executor, is_direct
from warpformer.ops._recording import Recording

MOST_TOKENS = 16  # of a sequence: more are a prompt, which does not come again
ARGUMENTS = ("positions", "held", "totals")  # of Sequences, which change from call to call
MOST_ROWS = 256  # of all calls that are recorded: each keeps what it computes on the way


class RecordedCalls:
    """Calls of a model that differ in tokens and lengths alone, as the steps of decoding do: the first of a
    kind is recorded, and from then on done again without Python between its kernels. There is a kind for each
    number of sequences and of tokens; those that have not come for the longest time make room for others.

    What a call returns is overwritten by the next one of its kind. Meanwhile the model stays as it is:
    changes of its parameters in place count, others, new hooks and modes do not. Nothing is recorded in
    training, with hooks or a `forward` that somebody has set, under torch.autocast, or where a mode or
    profiler is active.
    """

    def __init__(self):
        self._calls: dict[tuple, _Call | None] = {}  # the latest last; None: cannot be recorded
        self._memory = None

    def again(
        self, tokens: Tensor, held: np.ndarray, longest: int, state: tuple, memory: tuple
    ) -> Tensor | None:
        """What a recorded call returns of other tokens and lengths; None if there is none.

        Args:
            tokens: [B, T].
            held: [B], tokens of each sequence before these.
            longest: tokens of the longest with these.
            state, memory: as in `record`.
        """
        kind = _kind(tokens, state)
        call = self._calls.get(kind)
        if call is None or memory != self._memory or longest > call.limit:
            return None
        self._calls[kind] = self._calls.pop(kind)
        return call(tokens, held)

    def record(
        self,
        model: nn.Module,
        function: Callable[[Tensor, Sequences], Tensor],
        tokens: Tensor,
        sequences: Sequences,
        limit: int | None,
        state: tuple,
        memory: tuple,
    ) -> Tensor:
        """function(tokens, sequences), which is recorded where it can be.

        Args:
            model: whose call it is.
            tokens: [B, T], all of which count.
            limit: tokens of a sequence up to which it can be done again; None: always.
            state: hashable, what tells one function from another.
            memory: tells apart what they read and write beside their arguments and parameters.
        """
        if memory != self._memory:
            self._calls.clear()
            self._memory = memory
        kind = _kind(tokens, state)
        cannot = kind in self._calls and self._calls[kind] is None
        if cannot or tokens.shape[1] > MOST_TOKENS or tokens.numel() > MOST_ROWS:
            return function(tokens.flatten(), sequences)
        if not is_direct(tokens) or autocast_dtype(tokens) is not None or not _is_plain(model):
            return function(tokens.flatten(), sequences)
        self._calls.pop(kind, None)
        call = _Call(function, tokens, sequences, limit)
        self._calls[kind] = call if call.recording.is_whole else None
        while sum(shape.numel() for shape, *_ in self._calls) > MOST_ROWS:
            del self._calls[next(iter(self._calls))]
        return call.recording.result


class _Call:
    """A recording, and the arguments that it is of: on the host, which on the CPU is where they are."""

    def __init__(self, function, tokens, sequences, limit):
        self.limit = inf if limit is None else limit
        self.tokens = tokens.clone()
        given = [getattr(sequences, name) for name in ARGUMENTS]
        self.host, copies = _side_by_side(given, torch.device("cpu"))
        self.arrays = [t.numpy() for t in copies]
        self.there = self.host
        if not tokens.is_cpu:
            self.there, copies = _side_by_side(given, tokens.device)
        fixed = replace(sequences, **dict(zip(ARGUMENTS, copies, strict=True)))
        self.columns = np.arange(tokens.shape[1])
        self.recording = Recording(lambda: function(self.tokens.flatten(), fixed), tokens.device)

    def __call__(self, tokens, held):
        self.tokens.copy_(tokens)
        positions, before, after = self.arrays
        positions.reshape(len(held), -1)[:] = held[:, None] + self.columns
        before[:] = held
        after[:] = held + len(self.columns)
        if self.there is not self.host:
            self.there.copy_(self.host, non_blocking=True)  # which is not pinned: it is read at once
        return self.recording()


def _side_by_side(tensors, device):
    """Bytes on the device, and in them copies of the tensors: one copy brings all."""
    sizes = [t.nbytes for t in tensors]
    memory = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    parts = zip(memory.split(sizes), tensors, strict=True)
    return memory, [part.view(t.dtype).view(t.shape).copy_(t) for part, t in parts]


def _kind(tokens, state):
    return tokens.shape, tokens.dtype, executor(tokens), state


def _is_plain(model):
    """Whether calling a module calls its class's forward and nothing else."""
    return not torch.nn.modules.module._has_any_global_hook() and not any(
        module.training or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )
