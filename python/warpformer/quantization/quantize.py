from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from warpformer import ops
from warpformer._C import InputError
from warpformer.ops._library import empty
from warpformer.ops._quantized import (
    FLOATS,
    INT8_FORMATS,
    NF4,
    check_format,
    describe,
    layout,
    pack_nibbles,
    resolve_group_size,
)
from warpformer.ops.linear import PANEL

BLOCK = 1 << 18  # weights at a time: what a search goes over again and again stays in the cache
CHUNK = 1 << 22  # weights that are quantized before they are packed
SHRINK = [1 - step / 20 for step in range(1, 15)]  # 0.95 to 0.3


@torch.no_grad()
def quantize(
    weight: Tensor,
    format: str,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    clip: str | None = None,
) -> ops.QuantizedWeight:
    """Rounds a weight to the nearest value of a format, group by group along its rows.

    With m the value of largest magnitude in a group, lo <= 0 <= hi its range, and s the scale:

        int8, int8_dynamic   s = |m| / 127       w ~ s * value, -127..127
        int4, int4_dynamic   s = m / -8          w ~ s * (code - 8): m is -8, so s may be negative
        with zero_points     s = (hi - lo) / 15  w ~ s * (code - zero), zero = round(-lo / s) in 0..15
        nf4                  s = |m|             w ~ s * NF4[code]

    Args:
        weight: [N, K], float32, bfloat16 or float16, finite; [E, N, K] for the experts of `grouped_linear`.
        format: "int8", "int8_dynamic", "int4", "int4_dynamic" or "nf4"; the dynamic ones hold the same
            numbers, and the kernel also quantizes the activations.
        group_size: weights of a row that share a scale: 32, 64, 128, or K or -1 for all of them, as
            int8_dynamic has it. The last group may be shorter. None: 128 of 4 bits, all of a row of int8.
        zero_points: an integer zero for each group (int4 only).
        clip: "mse" multiplies every scale with that of 1, 0.95, ..., 0.3 which leaves the smallest sum
            of squared errors in its group, clipping what no longer fits; None keeps the full range.

    Returns:
        QuantizedWeight with scales in bfloat16. Codes are chosen for the rounded scale: the error of a
        weight that is not clipped is at most |s| / 2. Without clip nothing is clipped in int8; in int4
        what lies beyond 7.5 s on the short side, by at most 1.04 |s|; with zero points the ends, by 0.06 s.

    Raises:
        InputError: the weight is no finite float matrix, an option is unknown or does not fit.
        TypeError: the weight is not a tensor.

    Source: Dettmers et al., "LLM.int8()" (2022), for the largest magnitude as scale; q4_0 of llama.cpp for
    the signed one, with which all 16 codes are used; Dettmers et al., "QLoRA" (2023), for nf4.
    """
    group_size = _check(weight, format, group_size, zero_points, clip)
    return _quantized(weight.detach(), format, group_size, zero_points, clip)


@torch.no_grad()
def quantize_packed(
    weight: Tensor,
    format: str,
    group_size: int | None = None,
    *,
    zero_points: bool = False,
    clip: str | None = None,
    gated: bool = False,
) -> ops.PackedWeight:
    """What `pack_linear` makes of `quantize`, some rows at a time: nothing else of the size of a large
    weight is ever in memory."""
    options = format, _check(weight, format, group_size, zero_points, clip), zero_points, clip
    if weight.numel() <= CHUNK:
        return ops.pack_linear(_quantized(weight.detach(), *options), gated=gated)
    data = None
    matrices = as_matrices(weight.detach(), gated)
    for i, rows, panels in chunks(matrices):
        packed = ops.pack_linear(_quantized(matrices[i, rows], *options))
        if data is None:
            shape = len(matrices), -(-matrices.shape[1] // PANEL), packed.data.shape[1]
            data = empty(shape, packed.data)
        data[i, panels] = packed.data
    data = data.view(*weight.shape[:-2], -1, data.shape[-1])
    return packed._replace(data=data, out_features=weight.shape[-2], gated=gated)


def as_matrices(weight: Tensor, gated: bool) -> Tensor:
    """[M, N, K]: those of experts, and of a gate and what it gates, whose panels lie apart as well."""
    return weight.unflatten(-2, (2 if gated else 1, -1)).flatten(0, -3)


def chunks(matrices: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Of each matrix in turn some rows, and their panels."""
    count, rows, depth = matrices.shape
    panels = max(1, CHUNK // max(1, depth) // PANEL)
    for i in range(count):
        for begin in range(0, -(-rows // PANEL), panels):
            yield i, slice(begin * PANEL, (begin + panels) * PANEL), slice(begin, begin + panels)


def _check(weight, format, group_size, zero_points, clip) -> int:
    """The group size in weights."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"quantize: weight must be a torch.Tensor, not {type(weight).__name__}")
    if weight.ndim not in (2, 3) or weight.dtype not in FLOATS or weight.is_meta:
        where = " meta" if weight.is_meta else ""
        raise InputError(f"quantize: weight = {describe(weight)}{where} is no matrix of 32 or 16 bit floats")
    depth = weight.shape[-1]
    group_size = resolve_group_size(format, depth, group_size)
    try:
        check_format(format, depth, group_size, zero_points)
    except InputError as error:
        raise InputError(f"quantize: weight = {describe(weight)}: {error}") from None
    if clip not in (None, "mse"):
        raise InputError(f"quantize: clip = {clip!r} is neither None nor 'mse'")
    if not all(rows.isfinite().all() for rows in _blocks(weight.detach())):
        raise InputError(f"quantize: weight = {describe(weight)} has NaN or Inf")
    return group_size


def _blocks(weight):
    """Its rows, some at a time."""
    return weight.flatten(0, -2).split(max(1, BLOCK // max(1, weight.shape[-1])))


def _quantized(weight, format, group_size, zero_points, clip):
    depth, width = weight.shape[-1], group_size or 1
    shapes = layout(depth, format, group_size, zero_points)
    groups = shapes["scales"][0]
    dtypes = {"values": shapes["values"][1][0], "scales": torch.bfloat16, "zeros": torch.uint8}
    tensors = {
        name: torch.empty(*weight.shape[:-1], columns, dtype=dtypes[name], device=weight.device)
        for name, (columns, _) in shapes.items()
    }
    found = {name: tensor.flatten(0, -2) for name, tensor in tensors.items()}
    end = 0
    for rows in _blocks(weight):
        padded = F.pad(rows.float(), (0, groups * width - depth)).contiguous()
        codes, scales, zeros = _round(padded.unflatten(1, (groups, width)), format, zero_points, clip)
        codes = codes.flatten(1)[:, :depth]
        block = {"values": codes if format in INT8_FORMATS else pack_nibbles(codes)}
        block |= {"scales": scales, "zeros": zeros}
        some = slice(end, end := end + len(rows))
        for name, tensor in found.items():
            tensor[some] = block[name]
    return ops.QuantizedWeight(
        tensors["values"], tensors["scales"], tensors.get("zeros"), format, depth, group_size
    )


def _round(x, format, zero_points, clip):
    """Codes [n, G, width], scales [n, G] and zeros [n, G] of the groups x [n, G, width]."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    grid = _grid(low, high, format, zero_points, 1.0)
    if clip:
        least = _squared_error(x, *grid, format)
        for factor in SHRINK:
            other = _grid(low, high, format, zero_points, factor)
            error = _squared_error(x, *other, format)
            better = error < least
            grid = [torch.where(better, new, old) for new, old in zip(other, grid, strict=True)]
            least = torch.minimum(error, least)
    scale, zero = grid
    codes = _encode(x, scale, zero, format).to(torch.int8 if format in INT8_FORMATS else torch.uint8)
    return codes, scale.squeeze(-1).bfloat16(), zero.squeeze(-1).to(torch.uint8)


def _grid(low, high, format, zero_points, factor):
    """Scale, a bfloat16 number held as float32, and zero of groups in factor * (low..high)."""
    if zero_points:
        scale = _to_bfloat16((high / 15 - low / 15) * factor)
        return scale, _divide(-low * factor, scale).round().clamp(0, 15)
    largest = torch.where(high > -low, high, low)
    if format in INT8_FORMATS:
        return _to_bfloat16(largest.abs() / 127 * factor), torch.zeros_like(low)
    if format == "nf4":
        return _to_bfloat16(largest.abs() * factor), torch.zeros_like(low)
    return _to_bfloat16(largest / -8 * factor), torch.full_like(low, 8)


def _to_bfloat16(scale):
    """Rounded; but no scale becomes 0, Inf or a denormal number, of which too few bits are left."""
    limits = torch.finfo(torch.bfloat16)
    near = scale.abs().clamp(limits.tiny, limits.max).copysign(scale)
    return torch.where(scale == 0, 0, near).bfloat16().float()


def _divide(x, scale):
    return x / torch.where(scale == 0, 1, scale)


def _encode(x, scale, zero, format):
    numbers = _divide(x, scale)
    if format == "nf4":
        levels = torch.tensor(NF4, device=x.device)
        return torch.bucketize(numbers, (levels[1:] + levels[:-1]) / 2)
    lowest, highest = (-127, 127) if format in INT8_FORMATS else (0, 15)
    return numbers.round_().add_(zero).clamp_(lowest, highest)


def _squared_error(x, scale, zero, format):
    codes = _encode(x, scale, zero, format)
    numbers = torch.tensor(NF4, device=x.device)[codes] if format == "nf4" else codes - zero
    return (numbers * scale - x).square_().sum(-1, keepdim=True)
