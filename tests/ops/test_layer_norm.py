import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import ops

SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 768)


def operands(rows, n, dtype):
    return torch.randn(rows, n, dtype=dtype), torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype)


@pytest.mark.parametrize("n", SIZES)
def test_values(device, dtype, n):
    x, weight, bias = operands(4096 // n + 1, n, dtype)
    check(
        lambda x, w, b: ops.layer_norm(x, (n,), w, b),
        lambda x, w, b: F.layer_norm(x, (n,), w, b),
        *(x, weight, bias),
    )


@pytest.mark.parametrize("n", [16, 101])
def test_residual(device, dtype, n):
    x, weight, bias = operands(300, n, dtype)
    check(
        lambda x, r, w, b: ops.layer_norm(x, (n,), w, b, residual=r),
        lambda x, r, w, b: F.layer_norm(x + r, (n,), w, b),
        *(x, torch.randn(300, n, dtype=dtype), weight, bias),
    )


@pytest.mark.parametrize("given", ["weight", "bias", "neither"])
def test_optional_operands(device, dtype, given):
    x, weight, bias = operands(100, 101, dtype)
    weight, bias = (weight if given == "weight" else None), (bias if given == "bias" else None)
    check(
        lambda x, w, b: ops.layer_norm(x, (101,), w, b),
        lambda x, w, b: F.layer_norm(x, (101,), w, b),
        *(x, weight, bias),
    )


def test_several_dimensions(device, dtype):
    x, weight, bias = operands(60, 7 * 11, dtype)
    shaped = x.view(4, 15, 7, 11), weight.view(7, 11), bias.view(7, 11)
    out = ops.layer_norm(shaped[0], (7, 11), *shaped[1:], residual=shaped[0])
    assert same_bits(out.flatten(), ops.layer_norm(x, (77,), weight, bias, residual=x).flatten())
    across = ops.layer_norm(shaped[0].mT, (11, 7), shaped[1].mT, shaped[2].mT)
    torch.testing.assert_close(across.mT, ops.layer_norm(*shaped[:1], (7, 11), *shaped[1:]))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_eps_and_mean_far_from_zero(device, dtype, eps):
    x = 0.1 * torch.randn(100, 101, dtype=dtype) + 100
    check(lambda x: ops.layer_norm(x, (101,), eps=eps), lambda x: F.layer_norm(x, (101,), eps=eps), x)


def test_float32_parameters(device, dtype):
    x, weight, bias = torch.randn(100, 101, dtype=dtype), torch.randn(101), torch.randn(101)
    check(
        lambda x, w, b: ops.layer_norm(x, (101,), w, b),
        lambda x, w, b: F.layer_norm(x, (101,), w.to(x.dtype), b.to(x.dtype)),
        *(x, weight, bias),
    )


@pytest.mark.parametrize("n", [1, 16, 17, 256])
def test_constant_rows_give_the_bias(device, dtype, n):
    bias = torch.randn(n, dtype=dtype)
    out = ops.layer_norm(torch.full((3, n), 3.0, dtype=dtype), (n,), torch.randn(n, dtype=dtype), bias)
    assert torch.equal(out, bias.expand(3, n))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_small_shapes(device, dtype, shape):
    assert same_bits(
        ops.layer_norm(torch.randn(shape, dtype=dtype), shape[1:]), torch.zeros(shape, dtype=dtype)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(device, dtype, value):
    x, weight, bias = operands(3, 33, dtype)
    x[1, 7] = value
    out = ops.layer_norm(x, (33,), weight, bias)
    assert out[1].isnan().all()
    assert same_bits(out[::2], ops.layer_norm(x[::2], (33,), weight, bias))
