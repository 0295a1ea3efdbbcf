import pytest
import torch
import torch.nn.functional as F

from warpformer import ops
from warpformer.bench import roofline
from warpformer.bench._weights import random_weight
from warpformer.quantization import dequantize

# Of a small mixture, or of Mixtral: gate and up of its experts in one product.
EXPERTS, WIDTH, HIDDEN = (8, 4096, 14336) if roofline.on_gpu() else (8, 1024, 1792)


# Products of dense weights on a GPU are torch's.
@pytest.mark.parametrize("format", ["int4"] if roofline.on_gpu() else ["f32", "bf16", "int4"])
@pytest.mark.parametrize("rows", [16, 1024])
def bench_grouped_linear(compare, rows, format):
    """As many rows for each expert. torch multiplies expert by expert, int4 as bfloat16."""
    dtype = torch.float32 if format == "f32" else torch.bfloat16
    offsets = torch.arange(1, EXPERTS + 1) * (rows // EXPERTS)

    def inputs():
        x = torch.randn(rows, WIDTH, dtype=dtype)
        if format != "int4":
            dense = torch.randn(EXPERTS, 2 * HIDDEN, WIDTH, dtype=dtype) / WIDTH**0.5
            return x, ops.pack_linear(dense, gated=True), dense
        weights = [random_weight(format, 2 * HIDDEN, WIDTH, 128) for _ in range(EXPERTS)]
        dense = torch.stack([dequantize(weight).to(dtype) for weight in weights])
        values, scales = (torch.stack(tensors) for tensors in list(zip(*weights, strict=True))[:2])
        return x, ops.pack_linear(weights[0]._replace(values=values, scales=scales), gated=True), dense

    def theirs(x, packed, dense):
        of_experts = zip(x.chunk(EXPERTS), dense, strict=True)
        gate, up = torch.cat([F.linear(*expert) for expert in of_experts]).chunk(2, -1)
        return F.silu(gate) * up

    def by_grouped_mm(x, packed, dense):
        gate, up = F.grouped_mm(x, dense.mT, offs=offsets.int()).chunk(2, -1)
        return F.silu(gate) * up

    elements = EXPERTS * 2 * HIDDEN * WIDTH
    bits = {"f32": 32, "bf16": 16, "int4": 4.125}[format]
    compare(
        f"{rows} rows, {EXPERTS} experts {WIDTH} -> {HIDDEN} SwiGLU {format}",
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, packed, dense: ops.grouped_linear(x, packed, offsets, activation="silu"),
        peers={"torch": theirs} | ({"torch grouped_mm": by_grouped_mm} if roofline.on_gpu() else {}),
        moved=int(elements * bits / 8) + rows * (WIDTH + HIDDEN) * dtype.itemsize,
        flops=2 * rows * 2 * HIDDEN * WIDTH,
    )
