"""What the tests of ops measure with: the numerics policy of the library, and equality of bits."""

from contextlib import contextmanager

import torch
from torch import Tensor

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


def relative_error(out, truth):
    assert out.shape == truth.shape
    return ((out.double() - truth).norm() / truth.norm()).item()


def is_float(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    bits = [t.contiguous().view(integer) for t in (a, b)]
    return a.dtype == b.dtype and torch.equal(*bits)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
