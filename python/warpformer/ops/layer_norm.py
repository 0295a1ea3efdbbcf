from collections.abc import Sequence

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops import _norm
from warpformer.ops._arguments import check_flags, check_integers, check_number
from warpformer.ops._library import dispatch, executor, is_direct, register


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    return_sum: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization over the last dimensions, with the residual addition fused.

        z = input + residual        result = (z - mean z) / sqrt(var z + eps) * weight + bias

    Args:
        input: [..., *normalized_shape], float32, bfloat16 or float16, any strides.
        normalized_shape: the dimensions one mean and one (biased) variance are taken over.
        weight: normalized_shape; 1 if None.
        bias: normalized_shape; 0 if None.
        eps: added to the variance.
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
    all four tensors, with the same bits for any number of threads.
    Source: torch.nn.functional.layer_norm; Ba et al., "Layer Normalization".
    """
    check_number("layer_norm", "eps", eps)
    check_flags("layer_norm", return_sum=return_sum)
    out, sum = _norm.split("layer_norm", out, return_sum)
    direct = is_direct(input, optional=(weight, bias, residual, out, sum))
    normalized_shape = check_integers("layer_norm", "normalized_shape", normalized_shape)
    with_sum = _norm.keeps_sum(return_sum, residual, input, weight, bias)
    args = (input, residual, normalized_shape, weight, bias, eps, with_sum)
    if direct:
        found = _layer_norm(*args, out, sum, save=False)
    else:
        found = dispatch("layer_norm", *args, out=None if out is None else (out, sum))
    return _norm.returned(input, residual, *found[:2], return_sum, sum)


def _layer_norm(
    input, residual, normalized_shape, weight, bias, eps, with_sum, out=None, sum=None, *, save=True
):
    """(result, z, mean, rstd); empty or None where not wanted."""
    mean = rstd = None
    if save and out is None:
        mean, rstd = (_norm.statistic(input, normalized_shape) for _ in range(2))
    out, sum = _norm.outputs(input, residual, with_sum, out, sum, save)
    z = sum if with_sum else None
    operands = _norm.joined("layer_norm", normalized_shape, input, residual, weight, bias, z, out)
    _C.layer_norm(*operands, mean, rstd, eps, executor(input))
    _norm.write_back(z, operands[-2])
    _norm.write_back(out, operands[-1])
    return out, sum, mean, rstd


def _fake(input, residual, normalized_shape, weight, bias, eps, with_sum):
    mean, rstd = (_norm.statistic(input, normalized_shape) for _ in range(2))
    return *_norm.outputs(input, residual, with_sum), mean, rstd


def _setup_context(ctx, inputs, output):
    input, residual, ctx.normalized_shape, weight, bias, _, with_sum = inputs
    _, sum, *statistics = output
    _norm.save(ctx, (input, residual), with_sum, sum, (weight, bias), statistics)


def _backward(ctx, grad, grad_sum, *_):
    z, weight, bias, mean, rstd = ctx.saved_tensors
    dz, dweight, dbias = grad_sum, None, None
    if grad is not None:
        dz, dweight, dbias = torch.ops.warpformer.layer_norm_backward(
            grad, grad_sum, z, ctx.normalized_shape, weight, bias, mean, rstd, ctx.wanted
        )
    summands, parameters = _norm.input_gradients(ctx, dz, dweight, dbias)
    return *summands, None, *parameters, None, None


def _layer_norm_backward(grad, grad_sum, z, normalized_shape, weight, bias, mean, rstd, wanted):
    found = _norm.gradients((z, weight, bias), wanted)
    dz, dweight, dbias = (t if want else None for t, want in zip(found, wanted, strict=True))
    partials = _norm.partials(z, normalized_shape, 2) if wanted[1] or wanted[2] else None
    z, grad, grad_sum, weight, dz, dweight, dbias = _norm.joined(
        "layer_norm_backward", normalized_shape, z, grad, grad_sum, weight, dz, dweight, dbias
    )
    _C.layer_norm_backward(grad, grad_sum, z, weight, mean, rstd, dz, dweight, dbias, partials, executor(z))
    return tuple(found)


register(
    "layer_norm(Tensor input, Tensor? residual, SymInt[] normalized_shape, Tensor? weight, "
    "Tensor? bias, float eps, bool with_sum) -> (Tensor, Tensor, Tensor, Tensor)",
    _layer_norm,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out, Tensor(b!)? sum",
)
register(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor z, SymInt[] normalized_shape, "
    "Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    _layer_norm_backward,
    lambda grad, grad_sum, z, normalized_shape, weight, bias, mean, rstd, wanted: tuple(
        _norm.gradients((z, weight, bias), wanted)
    ),
)
