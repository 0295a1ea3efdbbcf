import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import ops

SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257, 768)


@pytest.mark.parametrize("n", SIZES)
def test_values(device, dtype, n):
    x, weight = torch.randn(4096 // n + 1, n, dtype=dtype), torch.randn(n, dtype=dtype)
    check(
        lambda x, w: ops.rms_norm(x, (n,), w, 1e-5),
        lambda x, w: F.rms_norm(x, (n,), w, 1e-5),
        *(x, weight),
    )


@pytest.mark.parametrize("eps", [None, 1e-12, 1e-5, 0.5])
def test_eps_without_weight(device, dtype, eps):
    """Small values, for the eps that None stands for to show."""
    x = 1e-3 * torch.randn(100, 101, dtype=dtype)

    def reference(x):
        return F.rms_norm(x, (101,), eps=torch.finfo(torch.float32).eps if eps is None else eps)

    check(lambda x: ops.rms_norm(x, (101,), eps=eps), reference, x)
    torch.testing.assert_close(ops.rms_norm(x, (101,), eps=eps), F.rms_norm(x, (101,), eps=eps))


def test_float32_weight(device, dtype):
    x, weight = torch.randn(100, 101, dtype=dtype), torch.randn(101)
    check(
        lambda x, w: ops.rms_norm(x, (101,), w, 1e-5),
        lambda x, w: F.rms_norm(x, (101,), w.to(x.dtype), 1e-5),
        *(x, weight),
    )


def test_several_dimensions(device, dtype):
    x, weight = torch.randn(60, 77, dtype=dtype), torch.randn(77, dtype=dtype)
    shaped = x.view(4, 15, 7, 11), weight.view(7, 11)
    out = ops.rms_norm(shaped[0], (7, 11), shaped[1], residual=shaped[0])
    assert same_bits(out.flatten(), ops.rms_norm(x, (77,), weight, residual=x).flatten())
    across = ops.rms_norm(shaped[0].mT, (11, 7), shaped[1].mT)
    torch.testing.assert_close(across.mT, ops.rms_norm(shaped[0], (7, 11), shaped[1]))


@pytest.mark.parametrize("n", [1, 16, 17, 256])
def test_rows_of_zeros_stay_zero(device, dtype, n):
    out = ops.rms_norm(torch.zeros(3, n, dtype=dtype), (n,), torch.randn(n, dtype=dtype))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_small_shapes(device, dtype, shape):
    out = ops.rms_norm(torch.randn(shape, dtype=dtype), shape[1:])
    assert same_bits(out, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_in_their_row(device, dtype, value):
    x, weight = torch.randn(3, 33, dtype=dtype), torch.randn(33, dtype=dtype)
    x[1, 7] = value
    out = ops.rms_norm(x, (33,), weight)
    assert out[1, 7].isnan()
    assert same_bits(out[::2], ops.rms_norm(x[::2], (33,), weight))
