import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from warpformer import ops
from warpformer.bench import roofline

HEADS, KV_HEADS, WIDTH = 32, 8, 128
SLOTS = 8192 if roofline.on_gpu() else 4096
SIZE = f", S {SLOTS}" if roofline.on_gpu() else ""
BATCHES = (1, 16) if roofline.on_gpu() else (1, 4)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def bench_decode(compare, batch, dtype):
    lengths = torch.full((batch,), SLOTS, dtype=torch.int32)

    def inputs():
        query = torch.randn(batch, 1, HEADS, WIDTH, dtype=dtype)
        return query, *torch.randn(2, batch, SLOTS, KV_HEADS, WIDTH, dtype=dtype)

    def ours(q, k, v):
        return ops.cached_attention(q, k, v, lengths)

    compare(
        f"B {batch}{SIZE}",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch": by_torch, **backends(*inputs())},
        moved=2 * batch * SLOTS * KV_HEADS * WIDTH * dtype.itemsize,
        flops=4 * batch * HEADS * SLOTS * WIDTH,
        memory="read",
    )


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("batch", BATCHES[1:])
def bench_paged_decode(compare, batch, block_size):
    """Beside our own decode of the same cache, not paged."""
    dtype = torch.bfloat16
    lengths = torch.full((batch,), SLOTS, dtype=torch.int32)
    blocks = batch * SLOTS // block_size
    table = torch.randperm(blocks).view(batch, -1).int()

    def inputs():
        query = torch.randn(batch, 1, HEADS, WIDTH, dtype=dtype)
        whole = torch.randn(2, batch, SLOTS, KV_HEADS, WIDTH, dtype=dtype)
        paged = torch.empty(2, blocks, block_size, KV_HEADS, WIDTH, dtype=dtype)
        paged[:, table.flatten().long()] = whole.view_as(paged)
        return query, *paged, *whole

    def ours(q, k, v, *_):
        return ops.cached_attention(q, k, v, lengths, block_table=table)

    def not_paged(q, paged_k, paged_v, k, v):
        return ops.cached_attention(q, k, v, lengths)

    compare(
        f"B {batch}{SIZE}, blocks of {block_size}",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"not paged": not_paged},
        moved=2 * batch * SLOTS * KV_HEADS * WIDTH * dtype.itemsize,
        flops=4 * batch * HEADS * SLOTS * WIDTH,
        memory="read",
    )


@pytest.mark.parametrize("batch", BATCHES)
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
        f"B {batch}{SIZE} int8",
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


def backends(*inputs):
    """torch by each of its kernels that takes these inputs; only a GPU has several."""
    found = {}
    for name, backend in BACKENDS.items() if roofline.on_gpu() else ():
        function = functools.partial(by_backend, backend)
        try:
            function(*inputs)
        except RuntimeError:
            continue
        found[name] = function
    return found


def by_backend(backend, *inputs):
    with sdpa_kernel(backend):
        return by_torch(*inputs)


def by_torch(q, k, v):
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
