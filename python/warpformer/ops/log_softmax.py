import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import dispatch, is_direct, register
from warpformer.ops.softmax import (
    BACKWARD,
    FORWARD,
    backward_by,
    fake,
    fake_backward,
    result_dtype,
    run,
    run_backward,
    setup_context,
)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    is_causal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Logarithm of the softmax along one dimension, with scale and masks fused.

        z = scale * input + mask          out = z - max z - log sum exp(z - max z)

    Args:
        input: any shape, float32, bfloat16 or float16, any strides.
        dim: the dimension whose exponentials sum to 1.
        dtype: of the result; that of `out`, or of `input`, if None.
        mask: broadcastable to `input`; bool (True = keep) or additive float.
        scale: multiplies `input` before the mask is added.
        is_causal: of [..., T, S], `dim` the last: row t keeps the elements 0 to t, and reads no others.
        out: where the result goes: the shape of `input`, any strides; it may be `input` itself.

    Returns:
        A contiguous tensor of the shape of `input`, or `out`. An element that is not kept (bool False, float
        -inf, later than a causal row) is -inf whatever `input` has there, also in a row that keeps nothing.

    Raises:
        InputError: `input` is not floating point, `mask` does not broadcast, `dim` is out of range or not
            that of `is_causal`, `out` has another shape or dtype.
        TypeError: an argument is not a tensor.

    Sums are float32. Gradients, of `input` and an additive `mask`, come from the result alone; elements that
    are not kept take no part in them: their gradient is 0. Source: torch.nn.functional.log_softmax.
    """
    args = (input, mask, dim, scale, is_causal, result_dtype("log_softmax", dtype, out))
    if is_direct(input, optional=(mask, out)):
        return _log_softmax(*args, out)
    return dispatch("log_softmax", *args, out=out)


def _log_softmax(input, mask, dim, scale, is_causal, dtype, out=None):
    return run(_C.log_softmax, input, mask, dim, scale, is_causal, dtype, out)


def _log_softmax_backward(*args):
    return run_backward(_C.log_softmax_backward, *args)


register(
    f"log_softmax{FORWARD}",
    _log_softmax,
    fake,
    setup_context=setup_context,
    backward=backward_by("log_softmax_backward"),
    out="Tensor(a!) out",
)
register(f"log_softmax_backward{BACKWARD}", _log_softmax_backward, fake_backward)
