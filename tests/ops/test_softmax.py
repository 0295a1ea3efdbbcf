import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import ops

SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257)


@pytest.mark.parametrize("n", SIZES)
def test_values(device, dtype, n):
    check(ops.softmax, lambda x: F.softmax(x, -1), 3 * torch.randn(4096 // n + 1, n, dtype=dtype))


@pytest.mark.parametrize("dim", range(-4, 4))
def test_dim(device, dtype, dim):
    x = torch.randn(5, 9, 17, 8, dtype=dtype)
    check(lambda x: ops.softmax(x, dim), lambda x: F.softmax(x, dim), x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (1, 1)])
def test_small_shapes(device, dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(ops.softmax(x), F.softmax(x, -1), rtol=0, atol=0)


@pytest.mark.parametrize("mask_shape", [(40, 3, 101), (3, 101), (101,), (40, 1, 1), (1, 101), ()])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_mask_and_scale(device, dtype, mask_shape, mask_dtype):
    x, mask = 3 * torch.randn(40, 3, 101, dtype=dtype), torch.randn(mask_shape)
    mask = mask > -1 if mask_dtype is torch.bool else mask.to(mask_dtype)

    def reference(x, mask):
        if mask.dtype is torch.bool:
            return F.softmax((0.3 * x).masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)
        return F.softmax(0.3 * x + mask.to(x.dtype), -1)

    check(lambda x, mask: ops.softmax(x, mask=mask, scale=0.3), reference, x, mask)


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_argument(device, dtype, result):
    x = torch.randn(50, 101, dtype=dtype)
    out = ops.softmax(x, dtype=result)
    assert out.dtype == result
    # One rounding, of the float32 result: not torch's, which rounds the input first.
    assert same_bits(out, ops.softmax(x.float()).to(result))


@pytest.mark.parametrize("mask", [torch.zeros(33, dtype=torch.bool), torch.full((33,), -torch.inf)])
def test_nothing_kept_is_zero(device, dtype, mask):
    for x in (torch.randn(4, 33, dtype=dtype), torch.full((4, 33), torch.nan, dtype=dtype)):
        assert same_bits(ops.softmax(x, mask=mask), torch.zeros(4, 33, dtype=dtype))


@pytest.mark.parametrize("masked", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("additive", [False, True])
def test_masked_elements_do_not_leak(device, dtype, masked, additive):
    x, keep = torch.randn(20, 33, dtype=dtype), torch.rand(20, 33) > 0.5
    mask = torch.zeros(20, 33).masked_fill(~keep, -torch.inf) if additive else keep
    clean = ops.softmax(x, mask=mask)
    assert same_bits(ops.softmax(x.masked_fill(~keep, masked), mask=mask), clean)
    assert (clean[~keep] == 0).all()


@pytest.mark.parametrize("n", [1, 16, 33])
def test_nan_and_infinity_stay_in_their_row(device, dtype, n):
    x = torch.randn(4, n, dtype=dtype)
    x[1, 0], x[2, n // 2] = torch.nan, torch.inf
    out = ops.softmax(x)
    assert out[1:3].isnan().all()
    assert same_bits(out[::3], ops.softmax(x[::3]))


def test_large_values_do_not_overflow(device, dtype):
    x = torch.tensor([[60000.0, 59000.0, -60000.0], [-60000.0, -60000.0, -60000.0]], dtype=dtype)
    torch.testing.assert_close(ops.softmax(x), F.softmax(x, -1), rtol=0, atol=0)
