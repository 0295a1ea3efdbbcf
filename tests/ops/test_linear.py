import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import ops

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


def ours(x, weight, bias=None, **options):
    return ops.linear(x, ops.pack_linear(weight), len(weight), bias, **options)


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
    batch = ops.linear(x, packed, 75, bias, activation="gelu")
    for m in range(1, 31):
        part = ops.linear(x[-m:], packed, 75, bias, activation="gelu")
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
    packed = ops.pack_linear(weight)
    assert packed.shape == (-(-n // 16), k, 16)
    padded = F.pad(weight.float(), (0, 0, 0, -n % 16))
    assert same_bits(packed, padded.view(len(packed), 16, k).mT)
    assert same_bits(ops.unpack_linear(packed, n), weight.float())
