"""linear with quantized weights: against float64 on the same weights and the same quantized activations."""

import pytest
import torch
import torch.nn.functional as F

from tests.check import check, relative_error, same_bits
from warpformer import InputError, ops, quantization
from warpformer.ops import QuantizedWeight

# format, group size (None: the whole row), zero points
LAYOUTS = [
    *(("int8", group_size, False) for group_size in (None, 32, 64, 128)),
    ("int8_dynamic", None, False),
    *((f, *rest) for f in ("int4", "int4_dynamic") for rest in ((32, False), (64, True), (None, True))),
    ("int4", 128, False),
    ("int4_dynamic", None, False),
    ("nf4", 64, False),
    ("nf4", None, False),
]
FORMATS = [
    ("int8", None),
    ("int8", 32),
    ("int8_dynamic", None),
    ("int4", 32),
    ("int4_dynamic", 32),
    ("nf4", 64),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}


def has_cuda_kernel(params):
    return True


def random_weight(n, k, format, group_size=None, zero_points=False):
    group_size = group_size or max(k, 1)
    if format.startswith("int8"):
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    else:
        codes = F.pad(torch.randint(0, 16, (n, k), dtype=torch.uint8), (0, k % 2))
        values = codes[:, ::2] | codes[:, 1::2] << 4
    scales = (torch.rand(n, max(1, -(-k // group_size))) - 0.3).bfloat16() / max(k, 1) ** 0.5
    zeros = torch.randint(0, 16, scales.shape, dtype=torch.uint8) if zero_points else None
    return QuantizedWeight(values, scales, zeros, format, k, group_size)


def dequantize(weight):
    """Float32 holds the products of these scales and values, all but those of nf4."""
    return quantization.dequantize(weight).double()


def quantize_activations(x, format):
    """The numbers that a dynamic format computes with, as float64."""
    x = x.float()
    if format == "int4_dynamic":
        blocks = F.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(-1, keepdim=True) / 127
        q = (blocks * (1 / scale)).nan_to_num().round()
        return (q.double() * scale.double()).flatten(-2)[..., : x.shape[-1]]
    if format == "int8_dynamic":
        low, high = -x.clamp(max=0).amin(-1, keepdim=True), x.clamp(min=0).amax(-1, keepdim=True)
        scale = (high + low) / 255
        zero = (low * (1 / scale)).round() - 128
        q = ((x * (1 / scale)).round() + zero).clamp(max=127)
        return (q - zero).double() * scale.double()
    return x.double()


@pytest.mark.parametrize(("n", "k"), [(33, 100), (70, 37), (150, 600)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_products(device, dtype, n, k, layout):
    weight = random_weight(n, k, *layout)
    dense, packed = dequantize(weight), ops.pack_linear(weight)
    x, bias = torch.randn(4096 // n + 1, k, dtype=dtype), torch.randn(n, dtype=dtype)
    truth = quantize_activations(x, weight.format) @ dense.mT + bias.double()
    for rows in (1, 13, len(x)):
        out = ops.linear(x[:rows], packed, bias)
        assert out.dtype == dtype
        assert relative_error(out, truth[:rows]) < TOLERANCE[dtype], rows
    dx = torch.ops.warpformer.linear_backward(truth.float(), packed.data, k, *packed[3:6])
    assert relative_error(dx, truth.float().double() @ dense) < 1e-6


def gradient_of_input(grad, packed):
    return torch.ops.warpformer.linear_backward(grad, packed.data, packed.in_features, *packed[3:6])


@pytest.mark.parametrize(("m", "n", "k"), [(150, 33, 37), (41, 70, 100), (17, 160, 264)])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_of_products(device, dtype, m, n, k, layout):
    """As exact as torch's, which multiplies by the weights in the dtype of the gradient."""
    weight = random_weight(n, k, *layout)
    packed, dense, grad = ops.pack_linear(weight), dequantize(weight), torch.randn(m, n, dtype=dtype)
    check(lambda grad: gradient_of_input(grad, packed), lambda grad: grad @ dense.to(grad.dtype), grad)


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("n", [40, 600])
def test_a_gradient_is_the_same_in_every_batch(device, dtype, format, group_size, n):
    packed = ops.pack_linear(random_weight(n, 75, format, group_size, zero_points=format == "int4"))
    grad = torch.randn(70, n, dtype=dtype)
    batch = gradient_of_input(grad, packed)
    for m in (1, 2, 16, 40, 65):
        assert same_bits(gradient_of_input(grad[-m:], packed), batch[-m:])
    assert same_bits(gradient_of_input(grad.mT.contiguous().mT, packed), batch)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(0, 5), (9, 0), (1, 1), (17, 257), (33, 64)])
def test_pack_and_unpack(device, n, k, layout):
    weight = random_weight(n, k, *layout)
    unpacked = ops.unpack_linear(ops.pack_linear(weight))
    assert torch.equal(unpacked.values, weight.values)
    assert torch.equal(unpacked.scales, weight.scales.float())
    assert weight.zeros is None or torch.equal(unpacked.zeros, weight.zeros)
    assert unpacked[3:] == weight[3:]


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_scales_of_float16_are_exact(format):
    """All 11 bits of them, as GGUF files have them, down to 2^-14 of the largest of a row."""
    weight = random_weight(40, 320, format, 32)
    scales = (torch.randn(40, 10) * 2.0 ** torch.randint(-10, 0, (40, 10))).half() / 64
    unpacked = ops.unpack_linear(ops.pack_linear(weight._replace(scales=scales)))
    assert torch.equal(unpacked.scales, scales.float())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_of_no_columns_the_bias_is_left(device, layout):
    packed = ops.pack_linear(random_weight(20, 0, *layout))
    x, bias = torch.randn(3, 0, requires_grad=True), torch.randn(20)
    out = ops.linear(x, packed, bias)
    assert torch.equal(out, bias.expand(3, 20))
    out.sum().backward()
    assert x.grad.shape == (3, 0)


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("k", [40, 600])
def test_a_row_is_the_same_in_every_batch(device, dtype, format, group_size, k):
    packed = ops.pack_linear(random_weight(75, k, format, group_size, zero_points=format == "int4"))
    x, bias = torch.randn(60, k, dtype=dtype), torch.randn(75, dtype=dtype)
    batch = ops.linear(x, packed, bias, activation="gelu")
    for m in (*range(1, 27), 40):
        assert same_bits(ops.linear(x[-m:], packed, bias, activation="gelu"), batch[-m:])


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize(("n", "k"), [(64, 5), (40, 600)])
def test_more_rows_than_a_block_has(format, group_size, n, k):
    """On the CPU: for each thread; and so short that one of them multiplies the rows of all."""
    packed, x = ops.pack_linear(random_weight(n, k, format, group_size)), torch.randn(1700, k)
    parts = [ops.linear(rows, packed) for rows in x.split(100)]
    assert same_bits(ops.linear(x, packed), torch.cat(parts))


@pytest.mark.parametrize(("format", "group_size"), [*FORMATS, ("int4", 64), ("int4", 128)])
def test_a_row_is_the_same_in_every_tile(device, dtype, format, group_size):
    """Kernels have tiles of other sizes for other numbers of rows, up to 256 of them."""
    weight = random_weight(136, 300, format, group_size, zero_points=format == "int4")
    packed, x = ops.pack_linear(weight), torch.randn(257, 300, dtype=dtype)
    batch = ops.linear(x, packed)
    truth = quantize_activations(x, format) @ dequantize(weight).mT
    assert relative_error(batch, truth) < TOLERANCE[dtype]
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 127, 129):
        assert same_bits(ops.linear(x[-m:], packed), batch[-m:])
    assert same_bits(ops.linear(x[:1].expand(20, -1), packed), batch[:1].expand(20, -1))


@pytest.mark.parametrize("lowest", [0, -100, -255])
def test_integers_of_int8_dynamic_are_exact(device, lowest):
    """Where the range of a row has 255 steps of 1, its products are whole numbers, up to the largest."""
    k = 2**16
    x = torch.randint(lowest, lowest + 256, (5, k)).float()
    x[3] = lowest + 255
    x[:, 0], x[:, 1], x[:, 2] = lowest, lowest + 255, 0
    values = torch.randint(-127, 128, (40, k), dtype=torch.int8)
    values[0] = 127
    weight = QuantizedWeight(values, torch.ones(40, 1), None, "int8_dynamic", k, k)
    truth = x.double() @ values.double().mT
    assert torch.equal(ops.linear(x, ops.pack_linear(weight)), truth.float())


def test_integers_of_int4_dynamic_are_exact(device):
    x = torch.randint(-127, 128, (30, 320)).float()
    x[:, ::32] = 127
    weight = random_weight(40, 320, "int4_dynamic", 32)._replace(scales=torch.full((40, 10), 0.5))
    assert torch.equal(ops.linear(x, ops.pack_linear(weight)).double(), x.double() @ dequantize(weight).mT)


def test_outliers_of_the_activations(device):
    """Blocks of 32 keep channels that are 50 times as large as the rest to themselves."""
    x = torch.randn(64, 1024)
    x[:, [3, 200, 555, 1000]] *= 50
    weight = random_weight(128, 1024, "int4_dynamic", 32)
    out = ops.linear(x, ops.pack_linear(weight))
    assert relative_error(out, x.double() @ dequantize(weight).mT) < 0.015


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_stay_in_their_row(device, format, group_size, value):
    packed = ops.pack_linear(random_weight(40, 70, format, group_size))
    x = torch.randn(30, 70)
    clean = ops.linear(x, packed)
    x[13, 5] = value
    out = ops.linear(x, packed)
    assert not out[13].isfinite().any()
    assert same_bits(out[:13], clean[:13])
    assert same_bits(out[14:], clean[14:])


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("width", [16, 40])
def test_gated(device, format, group_size, width):
    weight = random_weight(2 * width, 70, format, group_size)
    x, bias = torch.randn(30, 70), torch.randn(2 * width)
    gate, up = ops.linear(x, ops.pack_linear(weight), bias).chunk(2, -1)
    gated = ops.pack_linear(weight, gated=True)
    assert torch.equal(ops.unpack_linear(gated).values, weight.values)
    out = ops.linear(x, gated, bias, activation="silu")
    torch.testing.assert_close(out, F.silu(gate) * up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_zeros(device, format, group_size):
    packed = ops.pack_linear(random_weight(40, 70, format, group_size))
    assert not ops.linear(torch.zeros(3, 70), packed).any()


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
def test_gradient(format, group_size):
    weight = random_weight(40, 70, format, group_size)
    x, bias = torch.randn(30, 70, requires_grad=True), torch.randn(40, requires_grad=True)
    args = (x, ops.pack_linear(weight), bias)
    out = ops.linear(*args, activation="gelu")
    grad = torch.randn_like(out)
    z = ops.linear(*args).detach().requires_grad_()
    (dz,) = torch.autograd.grad(F.gelu(z), z, grad)
    dx, db = torch.autograd.grad(out, (x, bias), grad)
    assert relative_error(dx, dz.double() @ dequantize(weight)) < 1e-6
    assert relative_error(db, dz.double().sum(0)) < 1e-6


def test_int8_dynamic_is_not_too_deep():
    k = 2**16 + 1
    weight = QuantizedWeight(torch.ones(1, k, dtype=torch.int8), torch.ones(1, 1), None, "int8_dynamic", k, k)
    with pytest.raises(InputError, match=r"kMaxInt8Depth.*int8_dynamic"):
        ops.pack_linear(weight)
