import pytest
import torch
import torch.nn.functional as F

from tests.check import check, check_gradients, same_bits
from warpformer import ops

SIZES = (2, 15, 16, 17, 31, 32, 33, 255, 256, 257)


@pytest.mark.parametrize("n", [*SIZES, 20_001, 70_000])
def test_values(device, dtype, n):
    check(ops.log_softmax, lambda x: F.log_softmax(x, -1), 3 * torch.randn(4096 // n + 1, n, dtype=dtype))


@pytest.mark.parametrize("dim", range(-4, 4))
def test_dim(device, dtype, dim):
    x = torch.randn(5, 9, 17, 8, dtype=dtype)
    check(lambda x: ops.log_softmax(x, dim), lambda x: F.log_softmax(x, dim), x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (1, 1)])
def test_small_shapes(device, dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    torch.testing.assert_close(ops.log_softmax(x), F.log_softmax(x, -1), rtol=0, atol=0)


@pytest.mark.parametrize("mask_shape", [(40, 3, 101), (3, 101), (40, 1, 1)])
@pytest.mark.parametrize("dim", [-1, 0])
def test_mask_and_scale(device, dtype, mask_shape, dim):
    check(
        lambda x, mask: ops.log_softmax(x, dim, mask=mask, scale=0.3),
        lambda x, mask: F.log_softmax(0.3 * x + mask, dim),
        3 * torch.randn(40, 3, 101, dtype=dtype),
        torch.randn(mask_shape, dtype=dtype),
    )


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("masked", [torch.nan, torch.inf, 0.0])
def test_masked_elements(device, dtype, dim, masked):
    """-inf, in a row that keeps nothing too; the others as if these were not there."""
    x, keep = torch.randn(33, 20, dtype=dtype), torch.rand(33, 20) > 0.5
    keep.select(dim, 0).fill_(True)
    keep.select(1 + dim, 3).fill_(False)
    out = ops.log_softmax(x.masked_fill(~keep, masked), dim, mask=keep)
    assert (out[~keep] == -torch.inf).all()
    exact = F.log_softmax(x.double().masked_fill(~keep, -torch.inf), dim)
    torch.testing.assert_close(out[keep], exact[keep].to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_causal(device, dtype):
    x = torch.randn(4, 40, 50, dtype=dtype)
    hidden = ~torch.ones(40, 50, dtype=torch.bool).tril()
    out = ops.log_softmax(x.masked_fill(hidden, torch.nan), is_causal=True)
    assert same_bits(out, ops.log_softmax(x, mask=~hidden))


def test_out_in_place(device, dtype):
    x = torch.randn(50, 101, dtype=dtype)
    expected = ops.log_softmax(x)
    assert ops.log_softmax(x, out=x) is x
    assert same_bits(x, expected)


@pytest.mark.parametrize("n", [*SIZES, 20_001])
def test_gradients(device, dtype, n):
    x = 3 * torch.randn(2**16 // n + 1, n, dtype=dtype)
    check_gradients(lambda x: ops.log_softmax(x, scale=0.3), lambda x: F.log_softmax(0.3 * x, -1), x)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradients_of_dim(device, dtype, dim):
    x = torch.randn(5, 70, 33, dtype=dtype)
    check_gradients(lambda x: ops.log_softmax(x, dim), lambda x: F.log_softmax(x, dim), x)


def test_gradient_of_mask(device, dtype):
    x, mask = torch.randn(7, 6, 20, 101, dtype=dtype), torch.randn(6, 20, 101, dtype=dtype)
    check_gradients(
        lambda x, mask: ops.log_softmax(x, mask=mask), lambda x, mask: F.log_softmax(x + mask, -1), x, mask
    )


@pytest.mark.parametrize("dim", [-1, 0])
@pytest.mark.parametrize("masked", [torch.nan, torch.inf, 1.0])
def test_gradient_where_masked(device, dtype, dim, masked):
    """0, and no part in the others, whatever the gradient of the result is there."""
    x, keep = torch.randn(20, 20, dtype=dtype, requires_grad=True), torch.rand(20, 20) > 0.5
    keep.select(1 + dim, 3).fill_(False)
    grad = torch.randn(20, 20, dtype=dtype)
    out = ops.log_softmax(x, dim, mask=keep)
    (found,) = torch.autograd.grad(out, x, grad.masked_fill(~keep, masked))
    grad = grad.double().masked_fill(~keep, 0)
    exact = grad - out.double().exp() * grad.sum(dim, keepdim=True)
    assert (found[~keep] == 0).all()
    torch.testing.assert_close(found.double(), exact.detach(), rtol=0.02, atol=20 * torch.finfo(dtype).eps)
