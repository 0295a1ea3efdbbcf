import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from warpformer import ops
from warpformer.bench import roofline
from warpformer.bench._compare import Graph

BOTH = (torch.float32, torch.bfloat16)
MINILM, BERT, LONG = (32, 12, 12, 128, 32), (8, 12, 12, 512, 64), (1, 16, 16, 1024, 64)
SHARED = (1, 32, 8, 4096, 128)  # key/value heads of 4 query heads each
WIDE, NARROW = (1, 16, 16, 8192, 128), (1, 16, 16, 8192, 64)  # of GPUs
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CASES = [
    *((shape, kind, dtype) for shape, kind in [(MINILM, "padding"), (BERT, "full")] for dtype in BOTH),
    *((LONG, kind, dtype) for kind in ("full", "causal") for dtype in BOTH),
    (LONG, "causal", torch.float16),
    (SHARED, "causal", torch.bfloat16),
]
GPU_CASES = [(shape, kind) for shape in (WIDE, NARROW) for kind in ("full", "causal")]


@pytest.fixture
def gpu():
    if not roofline.on_gpu():
        pytest.skip("sizes of a GPU")


def pinned(backend):
    """torch's op by one of its kernels."""

    def function(*args, **kwargs):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*args, **kwargs)

    return function


def backends(dtype):
    """Those of torch that this GPU has."""
    found = {}
    small = torch.randn(3, 1, 2, 64, 64, dtype=dtype)
    for name, backend in BACKENDS.items():
        try:
            pinned(backend)(*small)
        except RuntimeError:
            continue
        found[name] = pinned(backend)
    return found


def tensors(shape, dtype):
    batch, heads, kv_heads, length, width = shape
    return [torch.randn(batch, h, length, width, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def work(shape, kind, dtype):
    """Bytes and operations of a forward: of causal attention, those of the half that is seen."""
    batch, heads, kv_heads, length, width = shape
    moved = 2 * batch * (heads + kv_heads) * length * width * dtype.itemsize
    return moved, 4 * batch * heads * length * length * width // (2 if kind == "causal" else 1)


def name_of(shape, kind):
    batch, heads, kv_heads, length, width = shape
    shared = f"({kv_heads})" if kv_heads != heads else ""
    return f"[{batch}, {heads}{shared}, {length}, {width}] {kind}"


@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES, ids=str)
def bench_attention(compare, shape, kind, dtype):
    batch, heads, kv_heads, length, _ = shape

    def inputs():
        lengths = torch.randint(length // 2, length, (batch, 1))
        mask = (torch.arange(length) < lengths)[:, None, None] if kind == "padding" else None
        return *tensors(shape, dtype), mask

    def run(function):
        options = {"is_causal": kind == "causal", "enable_gqa": heads != kv_heads}
        return lambda q, k, v, mask: function(q, k, v, mask, **options)

    moved, flops = work(shape, kind, dtype)
    compare(
        name_of(shape, kind),
        dtype=dtype,
        inputs=inputs,
        ours=run(ops.scaled_dot_product_attention),
        peers={"torch": run(F.scaled_dot_product_attention)},
        moved=moved,
        flops=flops,
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("shape", "kind"), GPU_CASES, ids=str)
def bench_attention_on_a_gpu(compare, shape, kind):
    """Beside each kernel of torch."""

    def run(function):
        return lambda q, k, v: function(q, k, v, is_causal=kind == "causal")

    dtype = torch.bfloat16
    moved, flops = work(shape, kind, dtype)
    compare(
        name_of(shape, kind),
        dtype=dtype,
        inputs=lambda: tuple(tensors(shape, dtype)),
        ours=run(ops.scaled_dot_product_attention),
        peers={name: run(function) for name, function in backends(dtype).items()},
        moved=moved,
        flops=flops,
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("shape", "kind"), GPU_CASES, ids=str)
def bench_backward_on_a_gpu(compare, shape, kind):
    """Five products beside two of the forward, which is not timed: it is made once for all rounds."""
    dtype = torch.bfloat16
    batch, heads, _, length, width = shape
    leaves = [torch.randn(batch, heads, length, width, dtype=dtype) for _ in range(4)]

    def run(function):
        graph = Graph(lambda q, k, v: function(q, k, v, is_causal=kind == "causal"), *leaves)
        return lambda: graph.gradients()

    moved, flops = work(shape, kind, dtype)
    compare(
        name_of(shape, f"{kind}, backward"),
        dtype=dtype,
        inputs=tuple,
        ours=run(ops.scaled_dot_product_attention),
        peers={name: run(function) for name, function in backends(dtype).items()},
        moved=2 * moved,
        flops=5 * flops // 2,
    )


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("kv_heads", [16, 1])
def bench_forward_and_backward(compare, kv_heads, dtype):
    """Five products of the backward beside two of the forward."""
    shape = (1, 16, kv_heads, 1024, 64)

    def run(function):
        def forward_and_backward(grad, *leaves):
            graph = Graph(
                lambda q, k, v: function(q, k, v, is_causal=True, enable_gqa=kv_heads < 16), grad, *leaves
            )
            return graph.gradients()

        return forward_and_backward

    moved, flops = work(shape, "causal", dtype)
    compare(
        name_of(shape, "causal, forward and backward"),
        dtype=dtype,
        inputs=lambda: (torch.randn(1, 16, 1024, 64, dtype=dtype), *tensors(shape, dtype)),
        ours=run(ops.scaled_dot_product_attention),
        peers={"torch": run(F.scaled_dot_product_attention)},
        moved=3 * moved,
        flops=7 * flops // 2,
    )


@pytest.mark.parametrize("dtype", BOTH)
def bench_packed(compare, dtype):
    """Sequences without padding, against a mask over the padded batch."""
    lengths = [16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 176, 232, 288, 512]  # 128 in the mean
    heads, width = 12, 64
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    keep = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

    def inputs():
        packed = torch.randn(3, sum(lengths), heads, width, dtype=dtype)
        padded = torch.zeros(3, *keep.shape, heads, width, dtype=dtype)
        padded[:, keep] = packed
        return *packed, *padded.transpose(2, 3).contiguous()

    def ours(q, k, v, *padded):
        return ops.scaled_dot_product_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=starts)

    def theirs(q, k, v, *padded):
        return F.scaled_dot_product_attention(*padded, keep[:, None, None]).transpose(1, 2)[keep]

    compare(
        f"packed, {len(lengths)} sequences of 16 to 512",
        dtype=dtype,
        inputs=inputs,
        ours=ours,
        peers={"torch, padded": theirs},
        moved=4 * sum(lengths) * heads * width * dtype.itemsize,
        flops=4 * sum(n * n for n in lengths) * heads * width,
    )
