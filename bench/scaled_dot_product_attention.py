import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

MINILM, BERT, LONG = (32, 12, 128, 32), (8, 12, 512, 64), (1, 16, 1024, 64)
CASES = [(MINILM, "padding"), (BERT, "full"), (BERT, "padding"), (LONG, "full"), (LONG, "causal")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kind"), CASES)
def bench_attention(compare, shape, kind, dtype):
    batch, heads, length, width = shape

    def inputs():
        lengths = torch.randint(length // 2, length, (batch, 1))
        mask = (torch.arange(length) < lengths)[:, None, None] if kind == "padding" else None
        return *torch.randn(3, *shape, dtype=dtype), mask

    def ours(q, k, v, mask):
        return ops.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")

    def theirs(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal")

    compare(
        f"{list(shape)} {kind}",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch": theirs},
        moved=4 * batch * heads * length * width * dtype.itemsize,
        flops=4 * batch * heads * length * length * width // (2 if kind == "causal" else 1),
    )
