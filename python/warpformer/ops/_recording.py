"""What a function did with its tensors, done again without Python between the kernels."""

from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from warpformer import _C

aten = torch.ops.aten
EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
PLACES = 2  # a decoder's logits of one token, and those of drafts
DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Recording(TorchDispatchMode):
    """A function that is called once, and whose work is then done again on the same memory.

        recording = Recording(function, device)
        recording.result                   what function() returned
        recording()                        the same kernels, in their order: `result` has new values

    Kernels of `_C` follow each other without Python. What torch computes between them is called again, too,
    views are not: all tensors, those in between included, stay where they are as long as the recording lives.
    What Python itself does, with numbers that it has of its own, is not done again. On a GPU all this is one
    CUDA graph, on the stream that is current when it is done again; the function is called once more for it.

    Args:
        function: of no arguments; returns a tensor. What it writes to others is the same at every call.
        device: what its tensors are on.

    Attributes:
        result: the tensor that the function returned, in memory of the recording.
        is_whole: whether all can be done again. Not where Python looked at values of a tensor, where an op of
            `torch.ops.warpformer` was called through torch's dispatcher, or where tensors came from another
            device.
    """

    def __init__(self, function, device: torch.device):
        super().__init__()
        self.is_whole = True
        self._parts = []
        self._begin()
        try:
            with beside(device), self:
                self.result = function()
        finally:
            self._calls.stop()
        if self.is_whole and device.type == "cuda":
            self._capture(function, device)

    def _capture(self, function, device):
        graph = torch.cuda.CUDAGraph()
        with beside(device):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on
            try:
                self.result = function()  # has values when the graph has run
            finally:
                graph.capture_end()
        self._parts = [graph.replay]
        self()

    def __call__(self) -> Tensor:
        for part in self._parts:
            part()
        return self.result

    def _begin(self):
        self._calls = _C.Calls()
        self._parts.append(self._calls.run)
        self._calls.record()

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # which would import the compiler: seconds, and nothing here is compiled

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        elsewhere = len(_devices((args, kwargs, result))) > 1
        if op.namespace == "warpformer" or elsewhere or not DEPENDS_ON_VALUES.isdisjoint(op.tags):
            self.is_whole = False
        elif not (op.is_view or op.overloadpacket in EMPTY):
            self._calls.stop()
            self._parts.append(partial(_again, op, args, kwargs or {}, result))
            self._begin()
        return result


def _devices(values):
    """Of the tensors among them; numbers are on any."""
    return {t.device for t in tree_leaves(values) if isinstance(t, Tensor) and t.ndim}


def _again(op, args, kwargs, result):
    found = op(*args, **kwargs)
    if found is not result:  # as that of an op in place is
        for old, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
            if isinstance(old, Tensor) and old is not new:
                old.copy_(new)


@contextmanager
def beside(device: torch.device):
    """On a GPU, another stream than the current one, as captures ask for; each waits for what the other has
    been given before."""
    if device.type != "cuda":
        yield
        return
    current = torch.cuda.current_stream(device)
    other = stream_beside(current)
    other.wait_stream(current)
    try:
        with torch.cuda.stream(other):
            yield
    finally:
        current.wait_stream(other)


@cache
def stream_beside(stream):
    """Always the same one: what is freed there may be taken again, but only after `stream` has been waited
    for."""
    return torch.cuda.Stream(stream.device)


class Repeated:
    """A function of tensors, recorded when it is called again with those of one of the last two calls, or
    others in their place. Results are copies."""

    def __init__(self, function):
        self.function = function
        self._known: dict[tuple, tuple[tuple, Recording | None]] = {}  # by their places, the latest last

    def __call__(self, *tensors: Tensor) -> Tensor:
        place = tuple(map(place_of, tensors))
        known = self._known.pop(place, None)
        if known is None:
            result, recording = self.function(*tensors), None
            if len(self._known) == PLACES:
                del self._known[next(iter(self._known))]
        else:
            tensors, recording = known
            result, recording = self._again(tensors, recording)
        self._known[place] = tensors, recording
        return result

    def _again(self, tensors, recording):
        if recording is None:
            recording = Recording(lambda: self.function(*tensors), tensors[0].device)
            return recording.result.clone(), recording
        return recording().clone() if recording.is_whole else self.function(*tensors), recording


def place_of(t: Tensor) -> tuple:
    """What two tensors have in common that are the same numbers in the same memory."""
    return type(t), t.data_ptr(), t.shape, t.stride(), t.dtype, t.device
