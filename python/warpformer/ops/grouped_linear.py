import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops import _runs
from warpformer.ops._arguments import check_flags
from warpformer.ops._kept import kept
from warpformer.ops._library import autocast_dtype, dispatch, empty, executor, is_direct, register
from warpformer.ops.linear import (
    DENSE,
    PackedWeight,
    _cut_halves,
    _empty_packed,
    _empty_product,
    _gradient_of_product,
    _pack_linear,
    _show,
    _workspace,
    is_plain,
    multiplies_by_torch,
)


def grouped_linear(
    input: Tensor,
    weight: PackedWeight | Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """A linear layer for each group of rows: the experts of a mixture.

        out[r] = act(input[r] W[e]^T + bias[e]), offsets[e - 1] <= r < offsets[e]

    and with a gated weight `ops.linear`'s gate.

    Args:
        input: [M, K], the rows of one expert after those of another; float32, bfloat16 or float16, any
            strides.
        weight: W [E, N, K] as `pack_linear` returns it, of any format, gated [E, 2 N, K]; or a tensor of that
            shape, which may require a gradient. It is packed at every call, or kept as `linear` keeps it.
        offsets: [E], where the rows of each expert end, int32 or int64: ascending, up to M.
        bias: [E, N], gated [E, 2 N]; 0 if None.
        activation: the name of a function of `ops.activation`.
        gated: whether a tensor W is gated; a packed one was packed so, or not.

    Returns:
        [M, N], contiguous, in the dtype of `input`; under torch.autocast in that of autocast, to which
        `input` and a tensor W are rounded: the bits that `linear` gives each expert's rows.

    Raises:
        InputError: a shape, dtype or format does not fit, the offsets do not ascend to M (on the CPU), the
            activation is not known, or `gated` is given with a packed weight that is not.
        TypeError: an argument is not a tensor, or the weight not a packed one.

    On a GPU a quantized weight is multiplied without a look at the offsets, so that nothing waits for the
    device and a CUDA graph can hold it. Offsets that do not ascend are then made to: one that lies below an
    earlier one counts as that one; and rows past the last one are 0. A tensor W is torch's there: bfloat16
    whose rows begin at multiples of 16 bytes by torch.nn.functional.grouped_mm, in the same way (of GPUs
    that are neither sm_90 nor sm_100 torch reads the offsets), all else expert by expert, which waits for the
    device to know the offsets and cannot be captured. Packed it is the same.

    The gradient of W is 0 for experts without rows. Source: torch's grouped_mm, whose `offs` are the
    offsets; Fedus et al., "Switch Transformers".
    """
    check_flags("grouped_linear", gated=gated)
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
    if not isinstance(weight, PackedWeight):
        direct = is_direct(input, weight, offsets, optional=(bias,))
        if input.ndim != 2 or weight.ndim != 3 or input.shape[1] != weight.shape[2]:
            raise _C.InputError(
                f"grouped_linear: input = {_show(input)} does not fit weight = {_show(weight)}"
            )
        trained = torch.is_grad_enabled() and weight.requires_grad
        args = (input, weight, offsets, bias, activation, gated, dtype or weight.dtype, not trained)
        return _dense_grouped_linear(*args) if direct else dispatch("dense_grouped_linear", *args)
    if gated and not weight.gated:
        raise _C.InputError("grouped_linear: gated = True, but the weight was packed with gated = False")
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
    if is_plain(data):
        _check_bias(bias, data)
        return _runs.linear(input, data, offsets, bias, activation, gated)
    out = _empty_product(input, out_features // (2 if gated else 1))
    layout = (format, group_size, zero_points, gated, activation)
    workspace = _workspace(input, format)
    _C.grouped_linear(input, data, offsets, bias, out, *layout, workspace, executor(input))
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

    dz = _gradient_of_product(grad, data, bias, ctx.layout, product)
    dx = db = None
    if input.requires_grad:
        dx = dispatch("grouped_linear_backward", dz, data, offsets, input.shape[-1], *layout)
        dx = dx.to(input.dtype)
    if bias is not None and bias.requires_grad:
        db = dispatch("grouped_sum", dz, offsets, bias.dtype)
        db = _cut_halves(db, grad.shape[-1]) if gated else db
    return dx, None, None, db, *[None] * len(ctx.layout)


def _grouped_linear_backward(grad, data, offsets, in_features, format, group_size, zero_points):
    if is_plain(data):
        return _runs.linear(grad, data.mT, offsets)
    dx = _empty_product(grad, in_features)
    _C.grouped_linear_backward(grad, data, offsets, dx, format, group_size, zero_points, executor(grad))
    return dx


def _dense_grouped_linear(input, weight, offsets, bias, activation, gated, dtype, keep):
    experts, out_features, in_features = weight.shape
    if multiplies_by_torch(input):
        _check_bias(bias, weight)
        return _runs.linear(input, weight.to(dtype), offsets, bias, activation, gated)
    layout = (DENSE.get(dtype, "f32"), in_features, 0, gated)
    if keep:
        data = kept(weight, (gated, dtype), lambda: _pack_linear(weight.to(dtype), None, None, *layout))
        options = (out_features, layout[0], 0, False, gated, activation)
        return _grouped_linear(input, data, offsets, bias, *options)
    _check_bias(bias, weight)
    out = _empty_product(input, out_features // (2 if gated else 1))
    # One pack after the other in the same memory, which stays in the cache until it is used.
    data = _empty_packed(weight[0], None, None, *layout) if experts else None
    epilogue = (layout[0], 0, False, gated, activation)
    for e, rows in enumerate(_runs.runs_of(offsets, experts, len(input))):
        if rows.start < rows.stop:
            _C.pack_linear(weight[e].to(dtype), None, None, data, *layout, executor(input))
            of_expert = None if bias is None else bias[e]
            _C.linear(input[rows], data, of_expert, None, out[rows], *epilogue, None, executor(input))
    return out


def _check_bias(bias, weight):
    if bias is not None and bias.shape != weight.shape[:2]:
        raise _C.InputError(f"grouped_linear: bias = {_show(bias)} does not fit weight = {_show(weight)}")


def _dense_context(ctx, inputs, output):
    input, weight, offsets, bias, *ctx.options = inputs
    ctx.save_for_backward(input, weight, offsets, bias)


def _dense_backward(ctx, grad):
    input, weight, offsets, bias = ctx.saved_tensors
    activation, gated, dtype, keep = ctx.options

    def product(x, weight, bias, keep):
        return dispatch("dense_grouped_linear", x, weight, offsets, bias, "none", False, dtype, keep)

    dz = grad
    if gated or activation != "none":
        z = product(input, weight, bias, keep)
        args = (grad, z, None, None, activation, gated, [True, False, False])
        dz = dispatch("activation_backward", *args)[0]
    dx = dw = db = None
    if input.requires_grad:
        dx = product(dz, weight.mT, None, False).to(input.dtype)
    if weight.requires_grad:
        dw = dispatch("grouped_outer_product", dz, input, offsets, weight.dtype)
    if bias is not None and bias.requires_grad:
        db = dispatch("grouped_sum", dz, offsets, bias.dtype)
    return dx, dw, None, db, *[None] * len(ctx.options)


def _grouped_outer_product(a, b, offsets, dtype):
    """[E, N, K]: a^T b of each expert's rows of a [M, N] and b [M, K]."""
    if multiplies_by_torch(a):
        return _runs.outer_product(a, b, offsets, dtype)
    experts = len(offsets)
    out = empty((experts, a.shape[1], b.shape[1]), a, dtype)
    format = DENSE.get(b.dtype, "f32")
    for rows, of_expert in zip(_runs.runs_of(offsets, experts, len(a)), out, strict=True):
        columns = b[rows].mT
        data = _pack_linear(columns, None, None, format, columns.shape[1], 0, False)
        _C.linear(a[rows].mT, data, None, None, of_expert, format, 0, False, False, "none", None, executor(a))
    return out


def _grouped_sum(input, offsets, dtype):
    """[E, N]: the sum of each expert's rows, in float32 or more."""
    if multiplies_by_torch(input):
        return _runs.sum_rows(input, offsets, dtype)
    runs = _runs.runs_of(offsets, len(offsets), len(input))
    sums = [input[rows].sum(0, dtype=torch.float32) for rows in runs]
    return torch.stack(sums).to(dtype) if sums else empty((0, input.shape[1]), input, dtype)


register(
    "grouped_outer_product(Tensor a, Tensor b, Tensor offsets, ScalarType dtype) -> Tensor",
    _grouped_outer_product,
    lambda a, b, offsets, dtype: empty((len(offsets), a.shape[1], b.shape[1]), a, dtype),
)
register(
    "grouped_sum(Tensor input, Tensor offsets, ScalarType dtype) -> Tensor",
    _grouped_sum,
    lambda input, offsets, dtype: empty((len(offsets), input.shape[1]), input, dtype),
)
register(
    "dense_grouped_linear(Tensor input, Tensor weight, Tensor offsets, Tensor? bias, str activation, "
    "bool gated, ScalarType dtype, bool keep) -> Tensor",
    _dense_grouped_linear,
    lambda input, weight, offsets, bias, activation, gated, dtype, keep: _empty_product(
        input, weight.shape[1] // (2 if gated else 1)
    ),
    setup_context=_dense_context,
    backward=_dense_backward,
)
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
