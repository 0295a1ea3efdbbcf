from collections.abc import Sequence

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import executor, is_direct, register


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """Layer normalization over the last dimensions, with the residual addition fused.

        z = input + residual        out = (z - mean z) / sqrt(var z + eps) * weight + bias

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16, any strides.
        normalized_shape: the dimensions one mean and one (biased) variance are taken over.
        weight: normalized_shape; 1 if None.
        bias: normalized_shape; 0 if None.
        eps: added to the variance.
        residual: the shape of `input`; 0 if None.

    Returns:
        A contiguous tensor of the shape and dtype of `input`.

    Raises:
        InputError: a shape does not fit `normalized_shape`, or a dtype is not floating point.
        TypeError: an argument is not a tensor.

    Statistics are float32. Source: torch.nn.functional.layer_norm; Ba et al., "Layer Normalization".
    """
    if is_direct(input, optional=(weight, bias, residual)):
        return _layer_norm(input, residual, normalized_shape, weight, bias, eps)
    return torch.ops.warpformer.layer_norm(input, residual, list(normalized_shape), weight, bias, eps)


def _layer_norm(input, residual, normalized_shape, weight, bias, eps):
    dims = len(normalized_shape)
    if dims == 0 or tuple(input.shape[-dims:]) != tuple(normalized_shape):
        raise _C.InputError(
            f"layer_norm: normalized_shape = {list(normalized_shape)} is not the end of "
            f"input.shape = {list(input.shape)}"
        )
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    operands = [input, residual, weight, bias, out]
    if dims > 1:
        operands = [None if t is None else _join_last(t, dims) for t in operands]
    _C.layer_norm(*operands, eps, executor(input))
    return out


def _join_last(t, dims):
    return t.flatten(t.ndim - dims) if t.ndim >= dims else t


register(
    "layer_norm(Tensor input, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor? bias, float eps) -> Tensor",
    _layer_norm,
    lambda input, residual, normalized_shape, weight, bias, eps: torch.empty(
        input.shape, dtype=input.dtype, device=input.device
    ),
)
