"""The formats of quantized weights: what a `QuantizedWeight` holds, and the numbers it stands for."""

import torch
from torch import Tensor
from torch.nn import functional as F

from warpformer._C import InputError

INT8_FORMATS = ("int8", "int8_dynamic")
INT4_FORMATS = ("int4", "int4_dynamic", "nf4")
FORMATS = INT8_FORMATS + INT4_FORMATS
GROUP_SIZES = (32, 64, 128)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def resolve_group_size(format: str, in_features: int, group_size: int | None) -> int:
    """in_features for -1; the default for None: 128 of 4 bits, in_features of 8."""
    if group_size is None:
        group_size = -1 if format in INT8_FORMATS else 128
    return in_features if group_size == -1 else group_size


def check_format(format: str, in_features: int, group_size: int, zero_points: bool) -> None:
    """InputError unless a weight of so many columns can be held like that."""
    if format not in FORMATS:
        raise InputError(f"format = {format!r} is none of {FORMATS}")
    if type(zero_points) is not bool:
        raise InputError(f"zero_points = {zero_points!r} is not a bool")
    if zero_points and format not in ("int4", "int4_dynamic"):
        raise InputError(f"zero_points: {format} is symmetric, int4 and int4_dynamic have them")
    sizes = () if format == "int8_dynamic" else GROUP_SIZES
    if type(group_size) is not int or group_size not in (*sizes, in_features):
        allowed = ", ".join(map(str, (*sizes, f"in_features = {in_features}")))
        raise InputError(f"group_size = {group_size!r} of {format} is none of {allowed}")


def layout(in_features: int, format: str, group_size: int, zero_points: bool):
    """Name of each tensor of a quantized weight -> (its columns, the dtypes it may have)."""
    is_int8 = format in INT8_FORMATS
    values = (in_features, (torch.int8,)) if is_int8 else (-(-in_features // 2), (torch.uint8,))
    groups = -(-in_features // group_size) if in_features else 1
    tensors = {"values": values, "scales": (groups, FLOATS)}
    if zero_points:
        tensors["zeros"] = groups, (torch.uint8,)
    return tensors


def check_quantized(weight) -> None:
    """InputError unless the tensors of a `QuantizedWeight` are those that its other fields promise."""
    check_format(weight.format, weight.in_features, weight.group_size, weight.zeros is not None)
    rows = weight.values.shape[: 2 if weight.values.ndim > 2 else 1]  # [E, N] or [N]
    expected = layout(weight.in_features, weight.format, weight.group_size, weight.zeros is not None)
    for name, (columns, dtypes) in expected.items():
        tensor = getattr(weight, name)
        if tensor.shape != (*rows, columns) or tensor.dtype not in dtypes:
            names = " or ".join(map(_name, dtypes))
            raise InputError(
                f"{name} = {describe(tensor)} of {weight.format} is not {names}{[*rows, columns]}"
            )
    if weight.scales.is_meta:
        return
    if not weight.scales.isfinite().all():
        raise InputError(f"scales = {describe(weight.scales)} has NaN or Inf")
    if weight.zeros is not None and (weight.zeros > 15).any():
        raise InputError(f"zeros = {describe(weight.zeros)} has values above 15")


def dequantize(weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that a quantized weight stands for.

        int8: w = scale * value
        int4: w = scale * (code - zero), zero 8 if symmetric
        nf4: w = scale * NF4[code]

    Args:
        weight: QuantizedWeight of a matrix [N, K], or of those of experts [E, N, K].
        dtype: of the result, which is computed in float32 and rounded to it.

    Returns:
        [N, K] or [E, N, K], contiguous.

    Raises:
        InputError: its tensors do not fit each other.

    Source: the formats of `warpformer.ops.QuantizedWeight`; for nf4 the table of the QLoRA paper.
    """
    check_quantized(weight)
    depth = weight.in_features
    if weight.format in INT8_FORMATS:
        numbers = weight.values.float()
    else:
        codes = unpack_nibbles(weight.values, depth)
        if weight.format == "nf4":
            numbers = torch.tensor(NF4, device=codes.device)[codes.int()]
        else:
            zeros = 8 if weight.zeros is None else _per_column(weight.zeros, weight)
            numbers = codes.float() - zeros
    return (numbers * _per_column(weight.scales, weight).float()).to(dtype)


def _per_column(values, weight):
    """[..., groups] -> [..., K]; [..., 1] as it is."""
    if values.shape[-1] == 1:
        return values
    return values.repeat_interleave(weight.group_size, dim=-1)[..., : weight.in_features]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., K] of 0..15 -> [..., ceil(K / 2)], the even column in the low half of a byte."""
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack_nibbles(values: Tensor, in_features: int) -> Tensor:
    return torch.stack((values & 15, values >> 4), dim=-1).flatten(-2)[..., :in_features]


def describe(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)}{list(tensor.shape)}"


def _name(dtype):
    return str(dtype).removeprefix("torch.")
