import pytest
import torch
import torch.nn.functional as F

from warpformer import ops

HEADS, KV_HEADS, SLOTS, WIDTH = 32, 8, 4096, 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def bench_decode(compare, batch, dtype):
    lengths = torch.full((batch,), SLOTS, dtype=torch.int32)

    def inputs():
        query = torch.randn(batch, 1, HEADS, WIDTH, dtype=dtype)
        return query, *torch.randn(2, batch, SLOTS, KV_HEADS, WIDTH, dtype=dtype)

    def ours(q, k, v):
        return ops.cached_attention(q, k, v, lengths)

    compare(
        f"B {batch}",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch": by_torch},
        moved=2 * batch * SLOTS * KV_HEADS * WIDTH * dtype.itemsize,
        flops=4 * batch * HEADS * SLOTS * WIDTH,
        memory="read",
    )


@pytest.mark.parametrize("batch", [1, 4])
def bench_int8_decode(compare, batch):
    """Beside our own decode of the same cache in bfloat16."""
    lengths = torch.full((batch,), SLOTS, dtype=torch.int32)

    def inputs():
        query = torch.randn(batch, 1, HEADS, WIDTH, dtype=torch.bfloat16)
        caches = torch.randint(-127, 128, (2, batch, SLOTS, KV_HEADS, WIDTH), dtype=torch.int8)
        scales = torch.full((2, batch, SLOTS, KV_HEADS), 2.0**-6)
        return query, *caches, *scales, *(caches * 2.0**-6).bfloat16()

    def ours(q, k, v, k_scales, v_scales, *_):
        return ops.cached_attention(q, k, v, lengths, key_scales=k_scales, value_scales=v_scales)

    def in_bfloat16(q, k, v, k_scales, v_scales, k_wide, v_wide):
        return ops.cached_attention(q, k_wide, v_wide, lengths)

    compare(
        f"B {batch} int8",
        dtype=torch.bfloat16,
        inputs=inputs,
        ours=ours,
        peers={"bfloat16": in_bfloat16},
        moved=2 * batch * SLOTS * KV_HEADS * (WIDTH + 4),
        flops=4 * batch * HEADS * SLOTS * WIDTH,
        memory="read",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [16, 128])
def bench_latent_decode(compare, heads, dtype):
    """DeepSeek's latent attention: one head of keys for all, whose first columns are the values."""
    lengths = torch.full((1,), SLOTS, dtype=torch.int32)

    def ours(q, k):
        return ops.cached_attention(q, k, k[..., :512], lengths)

    compare(
        f"latent H {heads}",
        dtype=dtype,
        inputs=lambda: tuple(torch.randn(1, n, g, 576, dtype=dtype) for n, g in ((1, heads), (SLOTS, 1))),
        ours=ours,
        peers={"torch": lambda q, k: by_torch(q, k, k[..., :512])},
        moved=SLOTS * 576 * dtype.itemsize,
        flops=2 * heads * SLOTS * (576 + 512),
        memory="read",
    )


def by_torch(q, k, v):
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
