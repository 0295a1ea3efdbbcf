import pytest
import torch
import torch.nn.functional as F

from tests.check import check, check_gradients, same_bits, threads
from warpformer import InputError, ops

SIZES = (1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257)


def rows_of(n):
    """So many that chance decides nothing: what rounds the sum of a row rounds all of it."""
    return 2**16 // n + 1


@pytest.mark.parametrize("n", SIZES)
def test_values(device, dtype, n):
    check(ops.softmax, lambda x: F.softmax(x, -1), 3 * torch.randn(rows_of(n), n, dtype=dtype))


@pytest.mark.parametrize("dim", range(-4, 4))
def test_dim(device, dtype, dim):
    x = torch.randn(5, 9, 17, 8, dtype=dtype)
    check(lambda x: ops.softmax(x, dim), lambda x: F.softmax(x, dim), x)


@pytest.mark.parametrize("inner", [2, 15, 16, 64, 65, 200])
def test_columns(device, dtype, inner):
    """Of a dimension before others: the bits of the same rows, however many are neighbours."""
    x = (3 * torch.randn(3, 40, inner, dtype=dtype)).requires_grad_()
    rows = x.mT.contiguous()
    out, expected = ops.softmax(x, 1, scale=0.3), ops.softmax(rows, scale=0.3)
    assert same_bits(out, expected.mT)
    grad = torch.randn(x.shape, dtype=dtype)
    (found,) = torch.autograd.grad(out, x, grad)
    assert same_bits(found, torch.autograd.grad(expected, rows, grad.mT.contiguous())[0].mT)


@pytest.mark.parametrize("n", [20_001, 70_000])
def test_long_rows(device, dtype, n):
    check(ops.softmax, lambda x: F.softmax(x, -1), 3 * torch.randn(2, n, dtype=dtype))


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


@pytest.mark.parametrize("mask_shape", [(40, 3, 101), (3, 1), (101,), (40, 1, 1)])
@pytest.mark.parametrize("boolean", [False, True])
def test_mask_of_columns(device, dtype, mask_shape, boolean):
    x, mask = 3 * torch.randn(40, 3, 101, dtype=dtype), torch.randn(mask_shape)
    mask = mask > -1 if boolean else mask.to(dtype)
    rows = ops.softmax(x.mT.contiguous(), mask=mask.expand(x.shape).mT, scale=0.3).mT
    out = ops.softmax(x, 1, mask=mask, scale=0.3)
    assert same_bits(out, rows)


def lower(t, s):
    return torch.ones(t, s, dtype=torch.bool).tril()


@pytest.mark.parametrize(("t", "s"), [(65, 65), (17, 131), (131, 17), (1, 4), (4, 1)])
def test_causal(device, dtype, t, s):
    x = 3 * torch.randn(2**16 // (t * s) + 1, 3, t, s, dtype=dtype)
    check(
        lambda x: ops.softmax(x, is_causal=True),
        lambda x: F.softmax(x.masked_fill(~lower(t, s), -torch.inf), -1),
        x,
    )


@pytest.mark.parametrize("later", [torch.nan, torch.inf])
def test_causal_reads_only_what_it_sees(device, dtype, later):
    x = torch.randn(2, 33, 40, dtype=dtype)
    mask = torch.randn(33, 40)
    expected = ops.softmax(x, mask=mask, is_causal=True)
    hidden = (t.masked_fill(~lower(33, 40), later) for t in (x, mask))
    x, mask = hidden
    assert same_bits(ops.softmax(x, mask=mask, is_causal=True), expected)


@pytest.mark.parametrize("dim", [-1, 1, 0])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "steps", "in place"])
def test_out(device, dtype, dim, layout):
    x = torch.randn(5, 70, 33, dtype=dtype)
    expected = ops.softmax(x, dim, scale=0.5)
    out = {
        "contiguous": torch.empty_like(x),
        "transposed": torch.empty(33, 70, 5, dtype=dtype).permute(2, 1, 0),
        "steps": torch.empty(5, 140, 66, dtype=dtype)[:, ::2, ::2],
        "in place": x,
    }[layout]
    assert ops.softmax(x, dim, scale=0.5, out=out) is out
    assert same_bits(out, expected)


def test_out_of_another_dtype(device, dtype):
    x, out = torch.randn(40, 33, dtype=dtype), torch.empty(40, 33)
    assert same_bits(ops.softmax(x, out=out), ops.softmax(x, dtype=torch.float32))
    with pytest.raises(InputError, match=r"dtype = torch\.float16 is not that of out = torch\.float32"):
        ops.softmax(x, dtype=torch.float16, out=out)
    with pytest.raises(NotImplementedError, match="out= takes no part in gradients"):
        ops.softmax(x.requires_grad_(), out=out)


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_argument(device, dtype, result):
    x = torch.randn(50, 101, dtype=dtype)
    out = ops.softmax(x, dtype=result)
    assert out.dtype == result
    # One rounding, of the float32 result: not torch's, which rounds the input first.
    assert same_bits(out, ops.softmax(x.float()).to(result))


@pytest.mark.parametrize("nothing", [False, -torch.inf])
def test_nothing_kept_is_zero(device, dtype, nothing):
    mask = torch.full((33,), nothing)
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


@pytest.mark.parametrize("n", SIZES[1:])
def test_gradients(device, dtype, n):
    x = 3 * torch.randn(rows_of(n), n, dtype=dtype)
    check_gradients(lambda x: ops.softmax(x, scale=0.3), lambda x: F.softmax(0.3 * x, -1), x)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradients_of_dim(device, dtype, dim):
    x = torch.randn(5, 70, 33, dtype=dtype)
    check_gradients(lambda x: ops.softmax(x, dim), lambda x: F.softmax(x, dim), x)


@pytest.mark.parametrize("n", [20_001, 70_000])
def test_gradients_of_long_rows(device, dtype, n):
    check_gradients(ops.softmax, lambda x: F.softmax(x, -1), torch.randn(2, n, dtype=dtype))


@pytest.mark.parametrize(
    "shape", [(9, 6, 20, 101), (6, 20, 101), (20, 101), (101,), (9, 1, 1, 101), (6, 1, 101)]
)
@pytest.mark.parametrize("dim", [-1, 1])
def test_gradient_of_mask(device, shape, dim):
    """Reduced to its shape; of the dtype of the mask, whatever that of the input."""
    x, mask = torch.randn(9, 6, 20, 101), torch.randn(shape).requires_grad_()
    grad = torch.randn(x.shape)
    (found,) = torch.autograd.grad(ops.softmax(x, dim, mask=mask, scale=0.3), mask, grad)
    exact = mask.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.softmax(0.3 * x.double() + exact, dim), exact, grad.double())[0]
    # The terms are up to 1 / n, and so is what rounding leaves of sums that are 0.
    torch.testing.assert_close(found, truth.float(), rtol=1e-5, atol=2e-5)
    assert found.shape == mask.shape


def test_gradient_of_mask_is_as_exact_as_torch(device, dtype):
    x, mask = torch.randn(7, 6, 20, 101, dtype=dtype), torch.randn(6, 20, 101, dtype=dtype)
    check_gradients(
        lambda x, mask: ops.softmax(x, mask=mask), lambda x, mask: F.softmax(x + mask, -1), x, mask
    )


def test_gradient_of_mask_in_any_number_of_threads(device):
    x, mask = torch.randn(300, 131), torch.randn(131, requires_grad=True)
    grad, gradients = torch.randn(300, 131), []
    for count in (1, 2, 3):
        with threads(count):
            gradients += torch.autograd.grad(ops.softmax(x, mask=mask), mask, grad)
    assert all(same_bits(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("masked", [torch.nan, torch.inf, 1.0])
def test_gradient_where_masked(device, dtype, masked):
    """0, whatever the gradient of the result is there; and of a row that keeps nothing."""
    x, keep = torch.randn(20, 33, dtype=dtype, requires_grad=True), torch.rand(20, 33) > 0.5
    keep[3] = False
    grad = torch.randn(20, 33, dtype=dtype)
    gradients = [
        torch.autograd.grad(ops.softmax(x, mask=keep), x, grad.masked_fill(~keep, value))[0]
        for value in (0.0, masked)
    ]
    assert same_bits(*gradients)
    assert (gradients[0][~keep] == 0).all()
    assert gradients[0][keep].isfinite().all()


def test_causal_gradients(device, dtype):
    x = torch.randn(4, 40, 50, dtype=dtype)
    hidden = ~lower(40, 50)
    check_gradients(
        lambda x: ops.softmax(x, is_causal=True),
        lambda x: F.softmax(x.masked_fill(hidden, -torch.inf), -1),
        x,
    )
