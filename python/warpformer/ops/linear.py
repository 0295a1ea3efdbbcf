from itertools import repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_flags, check_pair
from warpformer.ops._kept import kept
from warpformer.ops._library import autocast_dtype, dispatch, empty, executor, is_direct, register
from warpformer.ops.activation import _activation
from warpformer.ops.embedding_sum import embedding

PANEL = 16
DENSE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
DTYPES = {name: dtype for dtype, name in DENSE.items()}


class QuantizedWeight(NamedTuple):
    """A quantized weight [N, K] in the layout of checkpoints, the same on every device.

        int8, int8_dynamic:  w = scale value
        int4, int4_dynamic:  w = scale (code - zero), zero = 8 where `zeros` is None
        nf4:                 w = scale NF4[code]

    All tensors of the experts of `grouped_linear` begin with E.

    Attributes:
        values: int8 [N, K]; of 4 bits uint8 [N, ceil(K / 2)], two codes a byte, the low half an even k, 0
            past an odd end.
        scales: [N, ceil(K / group_size)] floats. Where a row has several, kernels keep 11 significant bits of
            them, and fewer of those below 2^-14 of the row's largest, as float16 has them.
        zeros: uint8 in the shape of `scales`, 0 to 15; int4 and int4_dynamic only.
        format: the name above. A dynamic one has the same values; its products quantize their input, too.
        in_features: K.
        group_size: 32, 64, 128, or K and more for one group a row, which is all that int8_dynamic has.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: str
    in_features: int
    group_size: int


class PackedWeight(NamedTuple):
    """A weight as `linear` reads it on the device that packed it: bytes in the layout of csrc/linear/op.h,
    and what they mean; on a GPU dense weights stay as they are. For another device it is packed anew, as
    layers do when they are moved.
    """

    data: Tensor  # uint8 [panels, bytes of a panel] or a plain [N, K]; those of experts begin with E
    out_features: int  # with `gated` rows of the gate and of `up`; of each expert
    in_features: int
    format: str
    group_size: int = 0
    zero_points: bool = False
    gated: bool = False


def pack_linear(weight: Tensor | QuantizedWeight, *, gated: bool = False) -> PackedWeight:
    """Rearranges the weight of a linear layer into the panels that `linear` reads.

    Args:
        weight: [N, K], float32, bfloat16 or float16, any strides, which is kept exactly; or a quantized one.
            [E, N, K] for the experts of `grouped_linear`; of a quantized one all tensors begin with E.
        gated: whether its rows are those of a gate and, below, as many of the projection that it gates.

    Returns:
        The packed weight; `unpack_linear` gives `weight` back. On a GPU a dense one is a copy of it.

    Raises:
        InputError: a shape, dtype, format or group size does not fit.
        TypeError: `weight` is neither a tensor nor a QuantizedWeight.

    Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication".
    """
    check_flags("pack_linear", gated=gated)
    if isinstance(weight, QuantizedWeight):
        values, scales, zeros, *layout = weight
    else:
        values, scales, zeros = weight, None, None
        is_direct(weight)
        if weight.ndim not in (2, 3):
            raise _C.InputError(f"pack_linear: weight = {_show(weight)} is neither [N, K] nor [E, N, K]")
        layout = (DENSE.get(weight.dtype, "f32"), weight.shape[-1], 0)
    args = (values, scales, zeros, *layout, gated)
    direct = is_direct(values, optional=(scales, zeros))
    data = _pack_linear(*args) if direct else dispatch("pack_linear", *args)
    return PackedWeight(data, values.shape[-2], layout[1], layout[0], layout[2], zeros is not None, gated)


def unpack_linear(packed: PackedWeight, *, rows: Tensor | None = None) -> Tensor | QuantizedWeight:
    """The weight that `pack_linear` made `packed` of, or some of its rows.

    Args:
        packed: as `pack_linear` returns it.
        rows: [M] int64 or int32, which rows, of a weight [N, K] that is not gated; all if None.

    Returns:
        A tensor [N, K] in its own dtype, or a QuantizedWeight whose scales are float32; of `rows` [M, K].

    Raises:
        InputError: the bytes are not as many as the format has, or one of `rows` is not there.
        TypeError: `packed.data` is not a tensor.

    Source: the layout in csrc/linear/op.h.
    """
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"unpack_linear: packed must be a PackedWeight, not {type(packed).__name__}")
    data, out_features, depth, format, group_size, zero_points, gated = packed
    is_direct(data, optional=(rows,))
    if is_plain(data):
        return data if rows is None else embedding(rows, data)
    if rows is not None and data.is_cuda:
        rows = rows.long().contiguous()
    is_dense = format in DTYPES
    groups = max(1, -(-depth // max(1, group_size)))
    bits_4 = not is_dense and not format.startswith("int8")
    shape = *data.shape[:-2], out_features if rows is None else len(rows)
    values = data.new_empty(
        *shape, -(-depth // 2) if bits_4 else depth,
        dtype=DTYPES.get(format, torch.uint8 if bits_4 else torch.int8),
    )  # fmt: skip
    scales = None if is_dense else data.new_empty(*shape, groups, dtype=torch.float32)
    zeros = data.new_empty(*shape, groups, dtype=torch.uint8) if zero_points else None
    if not data.is_meta:
        for tensors in _of_experts(data, values, scales, zeros):
            _C.unpack_linear(
                *(*tensors, rows, format, out_features, depth, group_size, gated), executor(data)
            )
    return values if is_dense else QuantizedWeight(values, scales, zeros, format, depth, group_size)


def linear(
    input: Tensor,
    weight: PackedWeight | Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Linear layer with bias, activation, gate and residual addition in its epilogue.

        out = act(input W^T + bias) + residual
        out = act(gate) up + residual, [gate, up] = input W^T + bias        with a gated weight

    Args:
        input: [..., K], float32, bfloat16 or float16, any strides.
        weight: W [N, K] as `pack_linear` returns it, gated [2 N, K]; or a tensor [N, K], which may require a
            gradient. It is packed at every call; but the pack of an nn.Parameter that gets no gradient now is
            kept until torch counts a change of it (of writes through `.data` tell `warpformer.repack_`).
        bias: [N], gated [2 N]; 0 if None.
        activation: the name of a function of `ops.activation`.
        residual: [..., N]; 0 if None.
        rows: (begin, end) of W, to multiply by these alone; `bias` is theirs. Of a packed weight, which must
            not be gated, `begin` is a multiple of 16.

    Returns:
        [..., N], contiguous, in the dtype of `input`; under torch.autocast in that of autocast, to which
        `input` and a tensor W are rounded.

    Raises:
        InputError: a shape, dtype or format does not fit, or the activation is not known.
        TypeError: an argument is not a tensor, or the weight not a packed one.

    How products are computed belongs to the format of the weight, at every number of rows. f32, f16, bf16,
    nf4, int4 and int8 multiply the input as it is (int4 and int8 a float32 one to 2^-17 of it, nf4 a bfloat16
    one by values rounded to bfloat16); int4_dynamic quantizes it to int8 per 32 of K, scale = max |x| / 127,
    q = round(x / scale); int8_dynamic per row, with a zero point: scale = (max(x, 0) - min(x, 0)) / 255,
    q = round(x / scale) - 128 + round(-min(x, 0) / scale), for K up to 65536. Sums are float32 or exact
    integers, and every element's has one order that depends on K alone: a row gives the same bits alone and
    in any batch. The gradient of `input` is that of the dequantized weight, on a GPU in the dtype of the
    gradient.

    Source: torch.nn.functional.linear; Goto and van de Geijn, "Anatomy of High-Performance Matrix
    Multiplication"; Dettmers et al., "LLM.int8()", "QLoRA"; Shazeer, "GLU Variants Improve Transformer".
    """
    dtype = autocast_dtype(input)
    if dtype is not None:
        input = input.to(dtype)
    if isinstance(weight, PackedWeight):
        data, out_features, in_features, format, group_size, zero_points, gated = _rows_of(weight, rows)
        direct = is_direct(input, data, optional=(bias, residual))
        if input.ndim == 0 or input.shape[-1] != in_features:
            raise _C.InputError(f"linear: input = {_show(input)} has not in_features = {in_features} columns")
        args = (input, data, bias, residual, out_features, format, group_size, zero_points, gated, activation)
        return _linear(*args) if direct else dispatch("linear", *args)
    direct = is_direct(input, weight, optional=(bias, residual))
    if weight.ndim != 2 or input.ndim == 0 or input.shape[-1] != weight.shape[1]:
        raise _C.InputError(f"linear: input = {_show(input)} does not fit weight = {_show(weight)}")
    begin, end = (0, weight.shape[0]) if rows is None else check_pair("linear", "rows", rows)
    if not 0 <= begin <= end <= weight.shape[0]:
        raise _C.InputError(f"linear: rows = {rows} are not among those of weight = {_show(weight)}")
    trained = torch.is_grad_enabled() and weight.requires_grad
    args = (input, weight, bias, residual, activation, begin, end, dtype or weight.dtype, not trained)
    return _dense_linear(*args) if direct else dispatch("dense_linear", *args)


def _rows_of(weight, rows):
    if rows is None:
        return weight
    begin, end = check_pair("linear", "rows", rows)
    if weight.gated or begin % PANEL or not 0 <= begin <= end <= weight.out_features:
        raise _C.InputError(
            f"linear: rows = {rows} are no panels of a packed weight of {weight.out_features} rows, gated = "
            f"{weight.gated}: they begin at a multiple of {PANEL}"
        )
    rows_of_data = 1 if is_plain(weight.data) else PANEL
    panels = weight.data[begin // rows_of_data : -(-end // rows_of_data)]
    return weight._replace(data=panels, out_features=end - begin)


def multiplies_by_torch(t: Tensor) -> bool:
    """Whether products of dense weights on the device of `t` are torch's: on a GPU they are cuBLAS's."""
    return t.is_cuda


def is_plain(data: Tensor) -> bool:
    """Whether the data of a packed weight are the weight itself, in the order of its rows."""
    return data.is_floating_point()


def padding_of_halves(data: Tensor, width: int) -> int:
    """Rows behind each half of a gated weight, which are whole panels but in a plain one."""
    return 0 if is_plain(data) else -width % PANEL


def _show(t):
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def _pack_linear(values, scales, zeros, format, in_features, group_size, gated):
    if values.ndim not in (2, 3):
        raise _C.InputError(f"pack_linear: values = {_show(values)} are neither [N, K] nor [E, N, K]")
    for name, t in (("scales", scales), ("zeros", zeros)):
        if t is not None and t.shape[:-1] != values.shape[:-1]:
            raise _C.InputError(f"pack_linear: {name} = {_show(t)} do not fit values = {_show(values)}")
    data = _empty_packed(values, scales, zeros, format, in_features, group_size, gated)
    if is_plain(data):
        return data.copy_(values)
    for tensors in _of_experts(values, scales, zeros, data):
        _C.pack_linear(*tensors, format, in_features, group_size, gated, executor(values))
    return data


def _of_experts(*tensors):
    """The tensors of each expert, where there are any."""
    if tensors[0].ndim == 2:
        return [tensors]
    return zip(*(repeat(None) if t is None else t for t in tensors), strict=False)


def _empty_packed(values, scales, zeros, format, in_features, group_size, gated):
    if values.is_floating_point() and multiplies_by_torch(values):
        return empty(values.shape, values)
    rows = values.shape[-2]
    panels = 2 * -(-(rows // 2) // PANEL) if gated else -(-rows // PANEL)
    size = _C.packed_size(format, in_features, group_size, zeros is not None)
    return empty((*values.shape[:-2], panels, size), values, torch.uint8)


def _linear(input, data, bias, residual, out_features, format, group_size, zero_points, gated, activation):
    if out_features < 0:
        raise _C.InputError(f"linear: out_features = {out_features} is negative")
    if is_plain(data):
        return _product_by_torch(input, data, bias, residual, activation, gated)
    out = _empty_product(input, out_features // (2 if gated else 1))
    layout = (format, group_size, zero_points, gated, activation)
    _C.linear(input, data, bias, residual, out, *layout, _workspace(input, format), executor(input))
    return out


def _workspace(input, format):
    """What a CUDA kernel needs beside; products of dense weights have none."""
    if format in DTYPES:
        return None
    size = _C.linear_workspace(input, format, executor(input))
    return empty((size,), input, torch.uint8) if size else None


def _empty_product(input, out_features):
    return empty((*input.shape[:-1], out_features), input)


def _setup_context(ctx, inputs, output):
    input, data, bias, residual, *ctx.layout = inputs
    ctx.save_for_backward(input, data, bias)
    ctx.residual = residual is not None and residual.requires_grad


def _backward(ctx, grad):
    input, data, bias = ctx.saved_tensors
    format, group_size, zero_points, gated = ctx.layout[1:5]
    layout = (format, group_size, zero_points)

    def product(bias, features):
        return dispatch("linear", input, data, bias, None, features, *layout, False, "none")

    dz = _gradient_of_product(grad, data, bias, ctx.layout, product)
    dx = db = None
    if input.requires_grad:
        dx = dispatch("linear_backward", dz, data, input.shape[-1], *layout).to(input.dtype)
    if bias is not None and bias.requires_grad:
        db = _as_rows(dz).sum(0)
        db = (_cut_halves(db, grad.shape[-1]) if gated else db).to(bias.dtype)
    return dx, None, db, grad if ctx.residual else None, *[None] * len(ctx.layout)


def _gradient_of_product(grad, data, bias, layout, product):
    """The gradient of z = input W^T + bias out of that of act(z) or, gated, act(gate) up, with what pads the
    halves of W. `product(bias, features)` is z, computed anew: half of the memory of a network are
    activations."""
    out_features, *_, gated, activation = layout
    if not gated and activation == "none":
        return grad
    padding = padding_of_halves(data, grad.shape[-1]) if gated else 0
    bias = _pad_halves(bias, padding) if gated and bias is not None else bias
    z = product(bias, out_features + 2 * padding)
    args = (F.pad(grad, (0, padding)), z, None, None, activation, gated, [True, False, False])
    return dispatch("activation_backward", *args)[0]


def _pad_halves(t, padding):
    return torch.cat([F.pad(half, (0, padding)) for half in t.chunk(2, -1)], -1)


def _cut_halves(t, width):
    return torch.cat([half[..., :width] for half in t.chunk(2, -1)], -1)


def _linear_backward(grad, data, in_features, format, group_size, zero_points):
    if is_plain(data):
        return _product_by_torch(grad, data.mT)
    dx = _empty_product(grad, in_features)
    _C.linear_backward(grad, data, dx, format, group_size, zero_points, executor(grad))
    return dx


def _dense_linear(input, weight, bias, residual, activation, begin, end, dtype, keep):
    if multiplies_by_torch(input):
        return _product_by_torch(input, weight[begin:end].to(dtype), bias, residual, activation)
    format = DENSE.get(dtype, "f32")

    def pack():
        values = weight[begin:end].to(dtype)
        return _pack_linear(values, None, None, format, values.shape[1], 0, False)

    data = kept(weight, (begin, end, dtype), pack) if keep else pack()
    return _linear(input, data, bias, residual, end - begin, format, 0, False, False, activation)


def _product_by_torch(input, weight, bias=None, residual=None, activation="none", gated=False):
    if bias is not None and bias.shape != weight.shape[:1]:
        raise _C.InputError(f"linear: bias = {_show(bias)} does not fit weight = {_show(weight)}")
    shape = *input.shape[:-1], len(weight) // (2 if gated else 1)
    if residual is not None and residual.shape != shape:
        raise _C.InputError(f"linear: residual = {_show(residual)} is not {list(shape)}")
    dtype = torch.promote_types(input.dtype, weight.dtype)
    out = F.linear(input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if gated or activation != "none":
        out = _activation(out, None, None, activation, gated)
    return (out if residual is None else out + residual).to(input.dtype)


def _dense_context(ctx, inputs, output):
    input, weight, bias, residual, *ctx.options = inputs
    ctx.save_for_backward(input, weight, bias)
    ctx.residual = residual is not None and residual.requires_grad


def _dense_backward(ctx, grad):
    input, weight, bias = ctx.saved_tensors
    activation, begin, end, dtype, keep = ctx.options
    dz = grad
    if activation != "none":
        z = dispatch("dense_linear", input, weight, bias, None, "none", begin, end, dtype, keep)
        args = (grad, z, None, None, activation, False, [True, False, False])
        dz = dispatch("activation_backward", *args)[0]
    dx = dw = db = None
    if input.requires_grad:
        dx = _product(dz, weight[begin:end].mT, dtype).to(input.dtype)
    rows = _as_rows(dz)
    if weight.requires_grad:
        dw = _product(rows.mT, _as_rows(input).mT, dtype).to(weight.dtype)
        if end - begin < len(weight):
            dw = F.pad(dw, (0, 0, begin, len(weight) - end))
    if bias is not None and bias.requires_grad:
        db = rows.sum(0).to(bias.dtype)
    return dx, dw, db, grad if ctx.residual else None, *[None] * len(ctx.options)


def _as_rows(t):
    return t[None] if t.ndim == 1 else t.flatten(0, -2)


def _product(a, b, dtype):
    """a b^T"""
    return dispatch("dense_linear", a, b, None, None, "none", 0, len(b), dtype, False)


register(
    "pack_linear(Tensor values, Tensor? scales, Tensor? zeros, str format, int in_features, int group_size, "
    "bool gated) -> Tensor",
    _pack_linear,
    _empty_packed,
)
register(
    "linear_backward(Tensor grad, Tensor data, SymInt in_features, str format, int group_size, "
    "bool zero_points) -> Tensor",
    _linear_backward,
    lambda grad, data, in_features, *layout: _empty_product(grad, in_features),
)
register(
    "linear(Tensor input, Tensor data, Tensor? bias, Tensor? residual, SymInt out_features, str format, "
    "int group_size, bool zero_points, bool gated, str activation) -> Tensor",
    _linear,
    lambda input, data, bias, residual, out_features, format, group_size, zero_points, gated, activation: (
        _empty_product(input, out_features // (2 if gated else 1))
    ),
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "dense_linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str activation, SymInt begin, "
    "SymInt end, ScalarType dtype, bool keep) -> Tensor",
    _dense_linear,
    lambda input, weight, bias, residual, activation, begin, end, dtype, keep: _empty_product(
        input, end - begin
    ),
    setup_context=_dense_context,
    backward=_dense_backward,
)
