import pytest
import torch
import torch.nn.functional as F

import warpformer as wf
from tests.check import check, check_gradients, same_bits
from warpformer import ops
from warpformer.ops._quantized import FORMATS
from warpformer.quantization import quantize

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


def has_cuda_kernel(params):
    """Those of dense weights are torch's."""
    return params.get("mode") is not None


def ours(x, weight, bias=None, **options):
    return ops.linear(x, ops.pack_linear(weight), bias, **options)


def operands(m, n, k, dtype):
    x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype) / max(k, 1) ** 0.5
    return x, weight, torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("k", [0, 1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 768])
def test_depth(device, dtype, k):
    check(ours, F.linear, *operands(70, 60, k, dtype))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257])
def test_columns(device, dtype, n):
    check(ours, F.linear, *operands(4096 // n + 1, n, 40, dtype))


@pytest.mark.parametrize("m", [1, 2, 11, 12, 13, 25, 240, 241, 300])
def test_rows(device, dtype, m):
    check(ours, F.linear, *operands(m, 4096 // m + 1, 40, dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(device, dtype, activation):
    residual = torch.randn(70, 60, dtype=dtype)
    check(
        lambda x, w, b, r: ours(x, w, b, activation=activation, residual=r),
        lambda x, w, b, r: ACTIVATIONS[activation](F.linear(x, w, b)) + r,
        *(*operands(70, 60, 33, dtype), residual),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_bias(device, dtype, activation):
    check(
        lambda x, w: ours(x, w, activation=activation),
        lambda x, w: ACTIVATIONS[activation](F.linear(x, w)),
        *operands(70, 60, 33, dtype)[:2],
    )


@pytest.mark.parametrize(
    ("shape", "n"), [((3,), 4), ((0, 3), 4), ((2, 0, 3), 4), ((2, 3), 0), ((1, 1), 1), ((2, 2, 5, 3), 4)]
)
def test_shapes(device, dtype, shape, n):
    x, (_, weight, bias) = torch.randn(shape, dtype=dtype), operands(1, n, shape[-1], dtype)
    torch.testing.assert_close(ours(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("k", [1, 40, 257, 600])
def test_a_row_is_the_same_in_every_batch(device, dtype, k):
    x, weight, bias = operands(100, 75, k, dtype)
    packed = ops.pack_linear(weight)
    batch = ops.linear(x, packed, bias, activation="gelu")
    for m in range(1, 31):
        part = ops.linear(x[-m:], packed, bias, activation="gelu")
        assert same_bits(part, batch[-m:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(device, dtype, value):
    x, weight, bias = operands(30, 40, 33, dtype)
    clean = ours(x, weight, bias)
    x[13, 5] = value
    out = ours(x, weight, bias)
    assert not out[13].isfinite().any()
    assert same_bits(out[:13], clean[:13])
    assert same_bits(out[14:], clean[14:])


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
@pytest.mark.parametrize("k", [0, 1, 31, 257])
def test_pack_and_unpack(device, dtype, n, k):
    weight = torch.randn(n, k, dtype=dtype)
    packed = ops.pack_linear(weight.mT.contiguous().mT)
    assert (packed.out_features, packed.in_features) == (n, k)
    assert same_bits(ops.unpack_linear(packed), weight)


def test_unpack_on_the_meta_device():
    dense = ops.unpack_linear(ops.pack_linear(torch.empty(5, 7, dtype=torch.bfloat16, device="meta")))
    assert (dense.is_meta, dense.shape, dense.dtype) == (True, (5, 7), torch.bfloat16)
    codes, scales, zeros = torch.empty(5, 20).byte(), torch.empty(5, 2), torch.empty(5, 2).byte()
    weight = ops.QuantizedWeight(codes.to("meta"), scales.to("meta"), zeros.to("meta"), "int4", 40, 32)
    unpacked = ops.unpack_linear(ops.pack_linear(weight))
    for ours, expected in zip(unpacked[:3], weight[:3], strict=True):
        assert (ours.is_meta, ours.shape, ours.dtype) == (True, expected.shape, expected.dtype)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients(device, dtype, packed, activation):
    x, weight, bias = operands(70, 60, 75, dtype)
    residual = torch.randn(70, 60, dtype=dtype)

    def op(x, w, b, r):
        return ops.linear(x, w, b, activation=activation, residual=r)

    def reference(x, w, b, r):
        return ACTIVATIONS[activation](F.linear(x, w, b)) + r

    if packed:
        fixed = ops.pack_linear(weight)
        check_gradients(
            lambda x, b, r: op(x, fixed, b, r),
            lambda x, b, r: reference(x, weight.to(x.dtype), b, r),
            x, bias, residual,
        )  # fmt: skip
    else:
        check_gradients(op, reference, x, weight, bias, residual)


def swiglu(x, weight, bias):
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    return F.silu(gate) * up


@pytest.mark.parametrize("width", [1, 16, 40])
def test_gated(device, dtype, width):
    x, weight, bias = operands(4096 // width + 1, 2 * width, 33, dtype)
    packed = ops.pack_linear(weight, gated=True)
    check(lambda x, w, b: ops.linear(x, packed, b, activation="silu"), swiglu, x, weight, bias)
    assert same_bits(ops.unpack_linear(packed), weight)


@pytest.mark.parametrize("width", [16, 40])
def test_gradients_of_gated(device, dtype, width):
    x, weight, bias = operands(70, 2 * width, 33, dtype)
    packed = ops.pack_linear(weight, gated=True)
    check_gradients(
        lambda x, b: ops.linear(x, packed, b, activation="silu"),
        lambda x, b: swiglu(x, weight.to(x.dtype), b),
        x, bias,
    )  # fmt: skip


def test_a_tensor_is_packed_at_every_call():
    x, weight, bias = operands(5, 7, 9, torch.float32)
    first = ops.linear(x, weight, bias)
    assert same_bits(first, ours(x, weight, bias))
    weight.data.add_(1)
    assert same_bits(ops.linear(x, weight, bias), ours(x, weight, bias))


def test_registration_of_a_weight_with_gradient():
    x, weight, bias = (t.requires_grad_() for t in operands(5, 7, 9, torch.float32))
    args = (x, weight, bias, torch.randn(5, 7), "gelu", 0, 7, torch.float32, False)
    torch.library.opcheck(torch.ops.warpformer.dense_linear.default, args)
    out = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")(x, weight, bias)
    gradients = torch.autograd.grad(out.sum(), (x, weight, bias))
    expected = torch.autograd.grad(ops.linear(x, weight, bias).sum(), (x, weight, bias))
    assert all(map(same_bits, gradients, expected))


@pytest.mark.parametrize("rows", [(0, 21), (4, 16), (21, 21)])
def test_rows_of_a_weight(dtype, rows):
    x, weight, bias = (t.requires_grad_() for t in operands(5, 21, 9, dtype))
    begin, end = rows
    out = ops.linear(x, weight, bias[begin:end], rows=rows)
    expected = ops.linear(x, weight[begin:end], bias[begin:end])
    assert same_bits(out, expected)
    gradients = (torch.autograd.grad(t.sum(), (x, weight, bias)) for t in (out, expected))
    assert all(map(same_bits, *gradients))
    kept = torch.nn.Parameter(weight.detach())
    with torch.no_grad():
        assert same_bits(ops.linear(x, kept, bias[begin:end], rows=rows), expected)
        assert same_bits(ops.linear(x, kept, bias), ops.linear(x, weight, bias))


def test_rows_outside_of_a_weight():
    for rows in ((-1, 3), (3, 2), (0, 8)):
        with pytest.raises(wf.InputError, match=r"rows = .* weight = float32\[7, 9\]"):
            ops.linear(torch.zeros(2, 9), torch.zeros(7, 9), rows=rows)


@pytest.mark.parametrize("mode", [None, *FORMATS])
@pytest.mark.parametrize(("rows", "depth"), [(1, 5), (13, 70), (40, 300)])
def test_rows_that_are_columns_in_memory(device, dtype, rows, depth, mode):
    x, weight = torch.randn(depth, rows, dtype=dtype).mT, torch.randn(20, depth)
    packed = ops.pack_linear(
        weight.to(dtype) if mode is None else quantize(weight, mode, None if mode == "int8_dynamic" else 32)
    )
    assert same_bits(ops.linear(x, packed), ops.linear(x.contiguous(), packed))
