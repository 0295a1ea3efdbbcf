import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import executor, is_direct, register


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Softmax along one dimension, with scale and mask fused.

        z = scale * input + mask          out = exp(z - max z) / sum exp(z - max z)

    Args:
        input: any shape, float32, bfloat16 or float16, any strides.
        dim: the dimension that sums to 1.
        dtype: of the result; that of `input` if None.
        mask: broadcastable to `input`; bool (True = keep) or additive float.
        scale: multiplies `input` before the mask is added.

    Returns:
        A contiguous tensor of the shape of `input`. A row that keeps nothing is 0.

    Raises:
        InputError: `input` is not floating point, `mask` does not broadcast, `dim` is out of range.
        TypeError: an argument is not a tensor.

    Sums are float32. Source: torch.nn.functional.softmax; "Attention Is All You Need", 3.2.1.
    """
    if is_direct(input, optional=(mask,)):
        return _softmax(input, mask, dim, scale, dtype)
    return torch.ops.warpformer.softmax(input, mask, dim, scale, dtype)


def _softmax(input, mask, dim, scale, dtype):
    out = torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)
    if input.ndim == 0:
        _softmax_into(input[None], mask, out[None], dim, scale)
    else:
        _softmax_into(input, mask, out, dim, scale)
    return out


def _softmax_into(input, mask, out, dim, scale):
    if mask is not None:
        mask = expand(mask, input.shape)
    _C.softmax(input, mask, out, dim, scale, executor(input))


def expand(mask, shape):
    """`mask` broadcast to `shape`; itself where it does not, for the op to refuse by name."""
    try:
        return mask.expand(shape)
    except RuntimeError:
        return mask


register(
    "softmax(Tensor input, Tensor? mask, int dim, float scale, ScalarType? dtype) -> Tensor",
    _softmax,
    lambda input, mask, dim, scale, dtype: torch.empty(
        input.shape, dtype=dtype or input.dtype, device=input.device
    ),
)
