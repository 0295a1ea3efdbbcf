import pytest
import torch
from torch.nn import functional as F

from warpformer import _C, ops
from warpformer.bench import roofline
from warpformer.bench._weights import nbytes, random_weight
from warpformer.bench.peers import torch as aten
from warpformer.quantization import dequantize

MODELS = [(4096, 384, 1536), (4096, 1536, 384), (512, 768, 3072)]  # MiniLM's and BERT's feed-forward
SIZE = 8192 if roofline.on_gpu() else 4096  # N and K of a layer of a large language model
ROWS = [1, 16, 512]
REST_SECONDS = 0.05  # a thread of onnxruntime spins for 33 ms, one of OpenMP for 10
F32, BF16 = torch.float32, torch.bfloat16
MODES = [  # format, group size, dtype of the input
    ("int8", SIZE, BF16),
    ("int8", SIZE, F32),
    ("int8", 32, BF16),
    ("int8_dynamic", SIZE, F32),
    ("int4", 128, BF16),
    ("int4", 128, F32),
    ("int4_dynamic", 32, F32),
    ("int4_dynamic", 128, F32),
    ("nf4", 64, BF16),
]
if roofline.on_gpu():
    ROWS = [1, 16, 512, 4096]
    MODES = [("int4", 128, BF16), ("int4", 128, torch.float16), ("int8", SIZE, BF16), ("nf4", 64, BF16)]
    MODES.append(("int8_dynamic", SIZE, BF16))
INT_MM_ROWS = 17  # that torch._int_mm asks for on a GPU, at least
dense = pytest.mark.skipif(roofline.on_gpu(), reason="products of dense weights on a GPU are torch's")


@dense
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("rows", "depth", "width"), MODELS)
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
        ours=lambda x, w, packed: ops.linear(x, packed, bias, activation="gelu" if widens else "none"),
        peers={"torch": theirs},
        moved=(rows * depth + depth * width + rows * width) * dtype.itemsize,
        flops=2 * rows * depth * width,
    )


@dense
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", ROWS)
def bench_large(compare, peer, rows, dtype):
    makers = {"torch": aten.linear}
    if dtype == F32 and (onnxruntime := peer("onnxruntime")):
        makers["onnxruntime"] = onnxruntime.matmul

    def inputs():
        x, w = torch.randn(rows, SIZE, dtype=dtype), torch.randn(SIZE, SIZE, dtype=dtype)
        return x, ops.pack_linear(w), {name: make(x, w) for name, make in makers.items()}

    compare_bound(compare, "", rows, dtype, inputs, list(makers), SIZE * SIZE * dtype.itemsize)


@pytest.mark.parametrize(("format", "group_size", "dtype"), MODES)
@pytest.mark.parametrize("rows", ROWS)
def bench_quantized(compare, peer, rows, format, group_size, dtype):
    """Beside whatever multiplies the same codes; what knows no bfloat16 is given those numbers in float32."""
    makers = {} if format == "int8" and group_size < SIZE else quantized_peers(peer, format, rows)

    def inputs():
        x, weight = torch.randn(rows, SIZE).to(dtype), random_weight(format, SIZE, SIZE, group_size)
        bound = {name: make(x.to(kind), weight) for name, (kind, make) in makers.items()}
        bound["torch"] = aten.linear(x, dequantize(weight).to(dtype))
        return x, ops.pack_linear(weight), bound

    case = f"{format} g{group_size} " if group_size < SIZE else f"{format} "
    weight_bytes = nbytes(random_weight(format, SIZE, SIZE, group_size))
    compute = "bf16" if roofline.on_gpu() else "int8" if format.endswith("dynamic") else None
    compare_bound(compare, case, rows, dtype, inputs, ["torch", *makers], weight_bytes, compute)


def quantized_peers(peer, format, rows):
    """Name -> dtype of the input, and what binds it and a weight of this format to a product."""
    if roofline.on_gpu():
        int_mm = {"torch int_mm": (BF16, aten.int8_dynamic)} if rows >= INT_MM_ROWS else {}
        makers = {"int4": {"torch int4pack": (BF16, aten.int4_cuda)}, "int8_dynamic": int_mm}
        return makers.get(format, {})
    makers = {
        "int8": {"torch int8pack": (BF16, aten.int8)},
        "int8_dynamic": {"torch int_mm": (F32, aten.int8_dynamic)},
        "int4": {"torch int4pack": (BF16, aten.int4)},
    }.get(format, {})
    if _C.isa() == "avx2":
        makers.pop("torch int_mm", None)  # held to it, its sums are wrong
    if onnxruntime := peer("onnxruntime"):
        makers |= {
            "int8_dynamic": {"onnxruntime": (F32, onnxruntime.dynamic_quantize_matmul)},
            "int4": {"onnxruntime": (F32, onnxruntime.matmul_nbits)},
            "int4_dynamic": {"onnxruntime": (F32, onnxruntime.matmul_nbits_dynamic)},
        }.get(format, {})
    if llama_cpp := peer("llama_cpp"):
        makers |= {
            "int8_dynamic": {"llama.cpp Q8_0": (F32, llama_cpp.Linear)},
            "int4_dynamic": {"llama.cpp Q4_0": (F32, llama_cpp.Linear)},
        }.get(format, {})
    return makers


def compare_bound(compare, case, rows, dtype, inputs, peers, weight_bytes, compute=None):
    """Of inputs (x, packed weight, {peer: product bound to them})."""
    compare(
        f"{case}{rows} x {SIZE} -> {SIZE}",
        dtype=dtype,
        inputs=inputs,
        ours=lambda x, packed, bound: ops.linear(x, packed),
        peers={name: lambda x, packed, bound, name=name: bound[name]() for name in peers},
        moved=2 * rows * SIZE * dtype.itemsize + weight_bytes,
        flops=2 * rows * SIZE * SIZE,
        compute=compute,
        rest=REST_SECONDS if "onnxruntime" in peers else 0,
    )
