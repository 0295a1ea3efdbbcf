import pytest
import torch

from warpformer import ops


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 1024), (16, 1)])
def bench_rope(compare, batch, tokens, dtype):
    heads, key_heads, width, past = 32, 8, 128, 1000
    cos, sin = ops.rope_tables(*_frequencies(width, past + tokens))
    positions = torch.arange(past, past + tokens)
    wide_cos, wide_sin = (torch.cat([t, t], -1)[positions].to(dtype)[:, None] for t in (cos, sin))

    def theirs(query, key):
        return query * wide_cos + rotate_half(query) * wide_sin, key * wide_cos + rotate_half(key) * wide_sin

    numbers = batch * tokens * (heads + key_heads) * width
    compare(
        f"[{batch}, {tokens}, {heads} and {key_heads}, {width}]",
        dtype=dtype,
        inputs=lambda: tuple(torch.randn(batch, tokens, h, width, dtype=dtype) for h in (heads, key_heads)),
        ours=lambda query, key: ops.rope(query, cos, sin, key=key, positions=positions)[0],
        peers={"torch rotate_half": lambda query, key: theirs(query, key)[0]},
        moved=2 * numbers * dtype.itemsize,
        flops=3 * numbers,
    )


def _frequencies(width, length):
    inv_freq, factor = ops.rope_frequencies(width)
    return inv_freq, length, factor
