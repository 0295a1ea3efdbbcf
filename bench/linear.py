import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

MODELS = [(4096, 384, 1536), (4096, 1536, 384), (512, 768, 3072)]  # MiniLM's and BERT's feed-forward
LARGE = [(1, 4096, 4096), (16, 4096, 4096), (512, 4096, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "depth", "width"), MODELS + LARGE)
def bench_linear(compare, rows, depth, width, dtype):
    """With bias, and with GELU where the layer widens. Weights differ from call to call, as layers' do."""
    bias = torch.randn(width, dtype=dtype)
    widens = width > depth

    def inputs():
        x, w = torch.randn(rows, depth, dtype=dtype), torch.randn(width, depth, dtype=dtype)
        return x, w, ops.pack_linear(w)

    def theirs(x, w, packed):
        y = F.linear(x, w, bias)
        return F.gelu(y) if widens else y

    compare(
        f"{rows} x {depth} -> {width}" + " gelu" * widens,
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, w, packed: ops.linear(x, packed, width, bias, activation="gelu" if widens else "none"),
        peers={"torch": theirs},
        moved=(rows * depth + depth * width + rows * width) * dtype.itemsize,
        flops=2 * rows * depth * width,
    )
