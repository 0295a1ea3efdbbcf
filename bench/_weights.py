"""Quantized weights of random codes, which every peer is given."""

import torch

from warpformer import ops


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


def nbytes(weight):
    """Of values and 16-bit scales."""
    return weight.values.nbytes + 2 * weight.scales.numel()
