import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

ROWS = (30522, 512, 2)  # BERT's words, positions and segments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [384, 1024])
def bench_embedding_sum(compare, width, dtype):
    batch, tokens = 16, 256
    tables = [torch.randn(rows, width, dtype=dtype) for rows in ROWS]

    def inputs():
        words = torch.randint(ROWS[0], (batch, tokens))
        return words, torch.arange(tokens).expand(batch, tokens), torch.randint(2, (batch, tokens))

    compare(
        f"[{batch}, {tokens}] width {width}",
        dtype=dtype,
        inputs=inputs,
        ours=lambda *indices: ops.embedding_sum(indices, tables),
        peers={"torch": lambda *indices: sum(map(F.embedding, indices, tables))},
        # A row of words and the output; positions and segments stay in the cache.
        moved=2 * batch * tokens * width * dtype.itemsize,
        flops=2 * batch * tokens * width,
    )
