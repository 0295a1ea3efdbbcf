"""torch's own products of quantized weights, as eager code calls them, on the CPU unless so named."""

import torch
from torch.nn import functional as F


def linear(x, weight):
    """Of one dtype."""
    return lambda: F.linear(x, weight)


def int4(x, weight):
    """Symmetric groups, exact activations."""
    values = weight.values
    codes = torch.stack((values & 15, values >> 4), -1).flatten(1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = weight.scales.to(x.dtype).t()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, weight.group_size, scales_and_zeros)


def int4_cuda(x, weight):
    """The same on a GPU, which takes the even column of a byte in its high half."""
    swapped = weight.values << 4 | weight.values >> 4
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scales = weight.scales.to(x.dtype).t()
    scales_and_zeros = torch.stack((scales, torch.zeros_like(scales)), -1).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group_size, scales_and_zeros)


def int8(x, weight):
    """Exact activations."""
    scales = weight.scales.flatten().to(x.dtype)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, weight.values, scales)


def int8_dynamic(x, weight):
    """int8 activations with a scale per row, as torchao has them."""
    values, scales = weight.values.t(), weight.scales.float().t()

    def product():
        x_scales = x.abs().amax(1, keepdim=True) / 127
        return torch._int_mm((x / x_scales).round().to(torch.int8), values) * x_scales * scales

    return product
