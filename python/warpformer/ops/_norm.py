"""What layer_norm and rms_norm share: everything but the statistics and the bias."""

import math

import torch

from warpformer._C import InputError
from warpformer.ops._library import empty


def split(name, out, return_sum):
    """`out` of a caller as (where the result goes, where the sum goes)."""
    if out is None or not return_sum:
        return out, None
    if not isinstance(out, tuple | list) or len(out) != 2:
        raise TypeError(f"{name}: with return_sum, out must be two tensors, not {type(out).__name__}")
    return tuple(out)


def keeps_sum(return_sum, residual, *operands):
    """Whether input + residual is written out: for the caller, or for backward."""
    grad = torch.is_grad_enabled() and _any_requires_grad(residual, *operands)
    return residual is not None and (return_sum or grad)


def _any_requires_grad(*tensors):
    return any(t is not None and t.requires_grad for t in tensors)


def returned(input, residual, result, sum, return_sum, sum_out):
    """What the op returns, of what its kernel wrote. Without residual, the sum is the input."""
    if not return_sum:
        return result
    if residual is None:
        sum = input if sum_out is None else sum_out.copy_(input)
    return result, sum


def outputs(input, residual, with_sum, out=None, sum=None, save=True):
    """(result, sum) to write to: those given, else fresh ones. A sum not wanted has no elements; without
    `save` there is none."""
    if out is None:
        out = empty(input.shape, input)
    if sum is None and (with_sum or save):
        # float32 is what torch gives two of the three dtypes; the op refuses all others.
        dtype = input.dtype if residual is None or residual.dtype == input.dtype else torch.float32
        sum = empty(input.shape if with_sum else (0,), input, dtype)
    return out, sum


def statistic(input, normalized_shape):
    """A fresh float for each row."""
    return empty(input.shape[: input.ndim - len(normalized_shape)], input, torch.float32)


def save(ctx, inputs, with_sum, sum, parameters, statistics):
    """What backward needs, of the call `inputs` = (input, residual) and its outputs."""
    input, residual = inputs
    if residual is not None and not with_sum:
        raise NotImplementedError("the gradient of a residual needs with_sum")
    ctx.mark_non_differentiable(*statistics, *([] if with_sum else [sum]))
    ctx.save_for_backward(sum if with_sum else input, *parameters, *statistics)
    ctx.dtypes = [t.dtype if _any_requires_grad(t) else None for t in inputs]
    ctx.wanted = [_any_requires_grad(*inputs), *map(_any_requires_grad, parameters)]


def input_gradients(ctx, dz, *others):
    """The gradients of (input, residual), which is that of their sum, and those of the parameters: None
    where not wanted."""
    summands = [None if dtype is None else dz.to(dtype) for dtype in ctx.dtypes]
    return summands, [t if want else None for t, want in zip(others, ctx.wanted[1:], strict=True)]


def gradients(tensors, wanted):
    """A fresh gradient for each of `tensors`; without elements where it is not wanted."""
    like = tensors[0]
    return [empty(t.shape, t) if want else empty((0,), like) for t, want in zip(tensors, wanted, strict=True)]


def partials(z, normalized_shape, kinds):
    """Room for `kinds` sums over each of several ranges of rows: as many as the shape says, whatever the
    number of threads."""
    columns = math.prod(normalized_shape)
    rows = z.numel() // max(1, columns)
    return empty((min(max(1, rows // 8), 512 if z.is_cuda else 64), kinds, columns), z, torch.float32)


def joined(name, normalized_shape, input, *others):
    """The tensors with those dimensions as their last one; `others` as they are where they have fewer, for
    the kernel to refuse by name."""
    dims = len(normalized_shape)
    if dims == 0 or tuple(input.shape[-dims:]) != tuple(normalized_shape):
        raise InputError(
            f"{name}: normalized_shape = {list(normalized_shape)} is not the end of "
            f"input.shape = {list(input.shape)}"
        )
    tensors = (input, *others)
    if dims == 1:
        return tensors
    return [t.flatten(t.ndim - dims) if t is not None and t.ndim >= dims else t for t in tensors]


def write_back(tensor, joined):
    """Brings what a kernel wrote to `joined` to `tensor`, where joining its dimensions took a copy."""
    if tensor is not None and joined.data_ptr() != tensor.data_ptr():
        tensor.copy_(joined.view(tensor.shape))
