import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import autocast_dtype, dispatch, executor, is_direct, register
from warpformer.ops.linear import PackedWeight, _cut_halves, _empty_product, _gradient_of_product, _show


def grouped_linear(
    input: Tensor,
    weight: PackedWeight,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """A linear layer for each group of rows: the experts of a mixture.

        out[r] = act(input[r] W[e]^T + bias[e]), offsets[e - 1] <= r < offsets[e]

    and with a gated weight `ops.linear`'s gate.

    Args:
        input: [M, K], the rows of one expert after those of another; float32, bfloat16 or float16, any
            strides.
        weight: W [E, N, K] as `pack_linear` returns it, of any format, gated [E, 2 N, K].
        offsets: [E], where the rows of each expert end, int32 or int64: ascending, up to M. A CPU tensor.
        bias: [E, N], gated [E, 2 N]; 0 if None.
        activation: the name of a function of `ops.activation`.

    Returns:
        [M, N], contiguous, in the dtype of `input`; under torch.autocast in that of autocast, to which it is
        rounded: the bits that `linear` gives each expert's rows.

    Raises:
        InputError: a shape, dtype or format does not fit, the offsets do not ascend to M, or the activation
            is not known.
        TypeError: an argument is not a tensor, or the weight not a packed one.

    The gradients are those of `input` and `bias`. Source: torch's grouped_mm, whose `offs` are the offsets;
    Fedus et al., "Switch Transformers".
    """
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"grouped_linear: weight is a PackedWeight, not a {type(weight).__name__}")
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
    data, out_features, in_features, format, group_size, zero_points, gated = weight
    direct = is_direct(input, data, offsets, optional=(bias,))
    if input.ndim != 2 or input.shape[1] != in_features:
        raise _C.InputError(f"grouped_linear: input = {_show(input)} is not [M, in_features = {in_features}]")
    args = (input, data, offsets, bias, out_features, format, group_size, zero_points, gated, activation)
    return _grouped_linear(*args) if direct else dispatch("grouped_linear", *args)


def _grouped_linear(
    input, data, offsets, bias, out_features, format, group_size, zero_points, gated, activation
):
    if out_features < 0:
        raise _C.InputError(f"grouped_linear: out_features = {out_features} is negative")
    out = _empty_product(input, out_features // (2 if gated else 1))
    layout = (format, group_size, zero_points, gated, activation)
    _C.grouped_linear(input, data, offsets, bias, out, *layout, executor(input))
    return out


def _setup_context(ctx, inputs, output):
    input, data, offsets, bias, *ctx.layout = inputs
    ctx.save_for_backward(input, data, offsets, bias)


def _backward(ctx, grad):
    input, data, offsets, bias = ctx.saved_tensors
    format, group_size, zero_points, gated = ctx.layout[1:5]
    layout = (format, group_size, zero_points)

    def product(bias, features):
        return dispatch("grouped_linear", input, data, offsets, bias, features, *layout, False, "none")

    dz = _gradient_of_product(grad, bias, ctx.layout, product)
    dx = db = None
    if input.requires_grad:
        dx = dispatch("grouped_linear_backward", dz, data, offsets, input.shape[-1], *layout)
        dx = dx.to(input.dtype)
    if bias is not None and bias.requires_grad:
        experts = torch.bucketize(torch.arange(len(dz), device=offsets.device), offsets, right=True)
        db = dz.new_zeros(len(offsets), dz.shape[-1]).index_add_(0, experts.to(dz.device), dz)
        db = (_cut_halves(db, grad.shape[-1]) if gated else db).to(bias.dtype)
    return dx, None, None, db, *[None] * len(ctx.layout)


def _grouped_linear_backward(grad, data, offsets, in_features, format, group_size, zero_points):
    dx = _empty_product(grad, in_features)
    _C.grouped_linear_backward(grad, data, offsets, dx, format, group_size, zero_points, executor(grad))
    return dx


register(
    "grouped_linear_backward(Tensor grad, Tensor data, Tensor offsets, SymInt in_features, str format, "
    "int group_size, bool zero_points) -> Tensor",
    _grouped_linear_backward,
    lambda grad, data, offsets, in_features, *layout: _empty_product(grad, in_features),
)
register(
    "grouped_linear(Tensor input, Tensor data, Tensor offsets, Tensor? bias, SymInt out_features, "
    "str format, int group_size, bool zero_points, bool gated, str activation) -> Tensor",
    _grouped_linear,
    lambda input, data, offsets, bias, out_features, format, group_size, zero_points, gated, activation: (
        _empty_product(input, out_features // (2 if gated else 1))
    ),
    setup_context=_setup_context,
    backward=_backward,
)
