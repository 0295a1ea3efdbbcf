"""Quantized weights of random codes, which every peer is given, and the numbers that they stand for."""

import torch

from warpformer import ops

NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


def random_weight(format, n, k, group_size):
    """Its elements have a size of about 1 / sqrt(k)."""
    bits = 8 if format.startswith("int8") else 4
    if bits == 8:
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    else:
        values = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    largest = 1 if format == "nf4" else 2 ** (bits - 1)
    scales = (1 + torch.rand(n, k // group_size)) / (largest * k**0.5)
    return ops.QuantizedWeight(values, scales.bfloat16(), None, format, k, group_size)


def dequantize(weight):
    if weight.values.dtype == torch.int8:
        return weight.values * weight.scales.float()
    codes = torch.stack((weight.values & 15, weight.values >> 4), -1).flatten(1)
    numbers = torch.tensor(NF4)[codes.int()] if weight.format == "nf4" else codes.float() - 8
    return numbers * weight.scales.float().repeat_interleave(weight.group_size, 1)


def nbytes(weight):
    """Of values and 16-bit scales."""
    return weight.values.nbytes + 2 * weight.scales.numel()
