from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from warpformer.nn.sequences import Sequences
from warpformer.ops._library import autocast_dtype, executor, is_direct
from warpformer.ops._recording import Recording

MOST_ROWS = 256  # of a call that is recorded: prompts do not come again, and take memory


class RecordedCalls:
    """Calls of a model that differ in tokens and lengths alone, as the steps of decoding do: the second of a
    kind in a row is recorded, and from then on done again without Python between its kernels.

    What a call returns is overwritten by the next one of its kind. Meanwhile the model stays as it is: changes
    of its parameters in place count, others and new hooks do not.

    Args of __call__:
        model: whose call it is. In training, or with hooks or a `forward` that somebody has set, nothing is
            recorded, and neither is under torch.autocast or where a mode or profiler is active.
        function: (tokens, sequences) -> tensor.
        tokens: [N] or [N, C].
        sequences: whose tokens they are.
        memory: tells apart what the function reads and writes beside its arguments and parameters.
    """

    def __init__(self):
        self._recordings: dict[tuple, _Call | None] = {}
        self._memory = self._last = None

    def __call__(
        self,
        model: nn.Module,
        function: Callable[[Tensor, Sequences], Tensor],
        tokens: Tensor,
        sequences: Sequences,
        memory: tuple,
    ) -> Tensor:
        if memory != self._memory:
            self._recordings.clear()
            self._memory = memory
        is_step = not sequences.is_first and sequences.kept is None and len(tokens) <= MOST_ROWS
        if not is_step or not is_direct(tokens) or autocast_dtype(tokens) is not None:
            return function(tokens, sequences)
        positions = sequences.positions
        kind = tokens.shape, tokens.dtype, sequences.shape, positions.dtype, positions.shape, executor(tokens)
        call = self._recordings.get(kind)
        if call is not None:
            return call(tokens, sequences)
        if kind in self._recordings or kind != self._last:
            self._last = kind
            return function(tokens, sequences)
        call = _Call(function, tokens, sequences) if _is_plain(model) else None
        self._recordings[kind] = call if call is not None and call.recording.is_whole else None
        return function(tokens, sequences) if call is None else call.recording.result


class _Call:
    """A recording, and the arguments that it is of."""

    def __init__(self, function, tokens, sequences):
        self.arguments = [t.clone() for t in _arguments(tokens, sequences)]
        tokens, positions, held, totals = self.arguments
        fixed = replace(sequences, positions=positions, held=held, totals=totals)
        self.recording = Recording(lambda: function(tokens, fixed))

    def __call__(self, tokens, sequences):
        for mine, new in zip(self.arguments, _arguments(tokens, sequences), strict=True):
            mine.copy_(new)
        return self.recording()


def _arguments(tokens, sequences):
    return tokens, sequences.positions, sequences.held, sequences.totals


def _is_plain(model):
    """Whether calling a module calls its class's forward and nothing else."""
    return not torch.nn.modules.module._has_any_global_hook() and not any(
        module.training or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in model.modules()
    )
