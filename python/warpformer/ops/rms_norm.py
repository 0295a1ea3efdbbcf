from collections.abc import Sequence

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops import _norm
from warpformer.ops._arguments import check_flags, check_integers, check_number
from warpformer.ops._library import dispatch, executor, is_direct, register


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root mean square normalization over the last dimensions, with the residual addition fused.

        z = input + residual        result = z / sqrt(mean z^2 + eps) * weight

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16, any strides.
        normalized_shape: the dimensions one mean square is taken over.
        weight: normalized_shape; 1 if None.
        eps: added to the mean square; as torch has it, the epsilon of float32 if None.
        residual: the shape of `input`; 0 if None.
        return_sum: also return z, which a pre-norm block adds its result to.
        out: where to write: the result or, with return_sum, (result, z). May be `input` or `residual`
            themselves; takes no part in gradients.

    Returns:
        A contiguous tensor of the shape and dtype of `input`; with return_sum a tuple of that and z, in the
        dtype torch gives to input + residual (`input` itself without a residual).

    Raises:
        InputError: a shape does not fit `normalized_shape`, or a dtype is not floating point.
        TypeError: an argument is not a tensor.

    z is rounded to its dtype before anything else is made of it; statistics are float32. Differentiable in
    all three tensors, with the same bits for any number of threads.
    Source: torch.nn.functional.rms_norm; Zhang and Sennrich, "Root Mean Square Layer Normalization".
    """
    check_flags("rms_norm", return_sum=return_sum)
    out, sum = _norm.split("rms_norm", out, return_sum)
    direct = is_direct(input, optional=(weight, residual, out, sum))
    normalized_shape = check_integers("rms_norm", "normalized_shape", normalized_shape)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    check_number("rms_norm", "eps", eps)
    with_sum = _norm.keeps_sum(return_sum, residual, input, weight)
    args = (input, residual, normalized_shape, weight, eps, with_sum)
    if direct:
        found = _rms_norm(*args, out, sum, save=False)
    else:
        found = dispatch("rms_norm", *args, out=None if out is None else (out, sum))
    return _norm.returned(input, residual, *found[:2], return_sum, sum)


def _rms_norm(input, residual, normalized_shape, weight, eps, with_sum, out=None, sum=None, *, save=True):
    """(result, z, rstd); empty or None where not wanted."""
    rstd = _norm.statistic(input, normalized_shape) if save and out is None else None
    out, sum = _norm.outputs(input, residual, with_sum, out, sum, save)
    z = sum if with_sum else None
    operands = _norm.joined("rms_norm", normalized_shape, input, residual, weight, z, out)
    _C.rms_norm(*operands, rstd, eps, executor(input))
    _norm.write_back(z, operands[-2])
    _norm.write_back(out, operands[-1])
    return out, sum, rstd


def _fake(input, residual, normalized_shape, weight, eps, with_sum):
    return *_norm.outputs(input, residual, with_sum), _norm.statistic(input, normalized_shape)


def _setup_context(ctx, inputs, output):
    input, residual, ctx.normalized_shape, weight, _, with_sum = inputs
    _, sum, rstd = output
    _norm.save(ctx, (input, residual), with_sum, sum, (weight,), (rstd,))


def _backward(ctx, grad, grad_sum, _):
    z, weight, rstd = ctx.saved_tensors
    dz, dweight = grad_sum, None
    if grad is not None:
        dz, dweight = torch.ops.warpformer.rms_norm_backward(
            grad, grad_sum, z, ctx.normalized_shape, weight, rstd, ctx.wanted
        )
    summands, parameters = _norm.input_gradients(ctx, dz, dweight)
    return *summands, None, *parameters, None, None


def _rms_norm_backward(grad, grad_sum, z, normalized_shape, weight, rstd, wanted):
    found = _norm.gradients((z, weight), wanted)
    dz, dweight = (t if want else None for t, want in zip(found, wanted, strict=True))
    partials = _norm.partials(z, normalized_shape, 1) if wanted[1] else None
    z, grad, grad_sum, weight, dz, dweight = _norm.joined(
        "rms_norm_backward", normalized_shape, z, grad, grad_sum, weight, dz, dweight
    )
    _C.rms_norm_backward(grad, grad_sum, z, weight, rstd, dz, dweight, partials, executor(z))
    return tuple(found)


register(
    "rms_norm(Tensor input, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, float eps, "
    "bool with_sum) -> (Tensor, Tensor, Tensor)",
    _rms_norm,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out, Tensor(b!)? sum",
)
register(
    "rms_norm_backward(Tensor grad, Tensor? grad_sum, Tensor z, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor rstd, bool[2] wanted) -> (Tensor, Tensor)",
    _rms_norm_backward,
    lambda grad, grad_sum, z, normalized_shape, weight, rstd, wanted: tuple(
        _norm.gradients((z, weight), wanted)
    ),
)
