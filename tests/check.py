"""What the tests of ops measure with: the numerics policy of the library, and equality of bits."""

import inspect
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from warpformer import InputError

OUTPUTS = 4096  # fewer are too few to judge an error by


def check(op, reference, *inputs):
    """`op(*inputs)` is as exact as torch: its relative Frobenius error is at most that of `reference`,
    torch's own kernel, on the same inputs (and 10 %), or half the spacing of its dtype.

    `reference` also gives the truth, from the same inputs as float64.
    """
    out = op(*inputs)
    truth = reference(*(t.double() if is_float(t) else t for t in inputs))
    by_torch = reference(*inputs)
    assert out.dtype == by_torch.dtype
    assert out.numel() >= OUTPUTS
    error, allowed = relative_error(out, truth), 1.1 * relative_error(by_torch, truth)
    assert error <= max(allowed, torch.finfo(out.dtype).eps / 2)


def check_gradients(op, reference, *inputs):
    """The gradients of `op` are as exact as torch's: `check`, for that of each floating point input.

    Gradients of the outputs are random, drawn anew for each input until it has OUTPUTS values of gradient,
    so that a weight is judged by as many as an activation. `op` and `reference` may return tuples.
    """
    doubled = (t.double() if is_float(t) else t for t in inputs)
    ours, by_torch, truth = _Graph(op, inputs), _Graph(reference, inputs), _Graph(reference, doubled)
    while few := [i for i, found in enumerate(ours.gradients) if sum(t.numel() for t in found) < OUTPUTS]:
        grads = [torch.randn_like(out, memory_format=torch.contiguous_format) for out in ours.outputs]
        for graph in (ours, by_torch, truth):
            graph.backward(grads, few)
    for i, leaf in enumerate(ours.leaves):
        own, expected, exact = (torch.stack(graph.gradients[i]) for graph in (ours, by_torch, truth))
        assert own.dtype == leaf.dtype
        error, allowed = relative_error(own, exact), 1.1 * relative_error(expected, exact)
        assert error <= max(allowed, torch.finfo(leaf.dtype).eps / 2), f"gradient {i}"


class _Graph:
    """`function(*inputs)`, and the gradients that backward() adds to the lists of floating inputs."""

    def __init__(self, function, inputs):
        inputs = [t.detach().requires_grad_() if is_float(t) else t for t in inputs]
        self.leaves = [t for t in inputs if is_float(t)]
        outputs = function(*inputs)
        self.outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        self.gradients = [[] for _ in self.leaves]

    def backward(self, grads, of):
        grads = [grad.to(out.dtype) for grad, out in zip(grads, self.outputs, strict=True)]
        leaves = [self.leaves[i] for i in of]
        found = torch.autograd.grad(self.outputs, leaves, grads, retain_graph=True)
        for i, gradient in zip(of, found, strict=True):
            self.gradients[i].append(gradient)


def relative_error(out, truth):
    assert out.shape == truth.shape
    return ((out.double() - truth).norm() / truth.norm()).item()


def is_float(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def host_reads(kernel):
    """Whether `kernel` of `_C` runs on the CPU and so can refuse indices by value: a GPU's, emulated or not,
    answers with NaN."""
    return torch.get_default_device().type == "cpu" and kernel.__module__ == "warpformer._C"


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits = [t.contiguous().view(integer) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


ODD = {
    "number": torch.zeros(()),
    "empty": torch.zeros(0),
    "matrix": torch.zeros(2, 3),
    "no columns": torch.zeros(2, 0),
    "five dimensions": torch.zeros(2, 1, 2, 3, 8),
    "meta": torch.zeros(1, device="meta"),
    "complex": torch.zeros(2, 3, dtype=torch.complex64),
    "float8": torch.zeros(2, 3).to(torch.float8_e4m3fn),
    "bool": torch.zeros(3, dtype=torch.bool),
    "large numbers": torch.full((3,), 2**62),
    "None": None,
    "text": "x",
    "nan": float("nan"),
    "infinite": -float("inf"),
    "huge": 2**70,
    "pair": (1.5, 2),
    "list": [None],
    "object": object(),
    "array": np.zeros(3),
}


def raw_errors(call):
    """What a call raises, besides errors of ours and TypeError, where one of its arguments, given or not, is
    ODD. A device is torch's to refuse."""
    signature = inspect.signature(call.op)
    found = {}
    for name in signature.parameters.keys() - {"device"}:
        for kind, value in ODD.items():
            bound = signature.bind(*call.args, **call.kwargs)
            bound.arguments[name] = value
            try:
                call.op(*bound.args, **bound.kwargs)
            except (InputError, TypeError):
                pass
            except Exception as error:
                if not str(error).startswith("warpformer."):  # no gradient
                    found[name, kind] = error
    return found


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
