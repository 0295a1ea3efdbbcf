"""What layer_norm and rms_norm have in common: residual and sum, out=, gradients, rows of any length."""

import pytest
import torch
import torch.nn.functional as F

from tests.check import check, check_gradients, same_bits, threads
from warpformer import nn, ops


class Norm:
    """An op over the last dimension, and torch's, as functions of (x, *parameters)."""

    def __init__(self, op, by_torch, parameters):
        self.op, self.by_torch, self.count, self.__name__ = op, by_torch, parameters, op.__name__

    def __call__(self, x, *parameters, **options):
        return self.op(x, x.shape[-1:], *parameters, eps=1e-5, **options)

    def reference(self, x, *parameters):
        return self.by_torch(x, x.shape[-1:], *parameters, eps=1e-5)

    def parameters(self, n, dtype):
        return tuple(torch.randn(self.count, n, dtype=dtype))

    def leaves(self, rows, n, dtype, **options):
        tensors = torch.randn(rows, n, dtype=dtype), *self.parameters(n, dtype)
        return [t.requires_grad_() for t in tensors]


NORMS = (Norm(ops.layer_norm, F.layer_norm, 2), Norm(ops.rms_norm, F.rms_norm, 1))
both = pytest.mark.parametrize("sample", NORMS, ids=lambda norm: norm.__name__)


@both
@pytest.mark.parametrize("n", [33, 256, 768])
def test_gradients(device, dtype, sample, n):
    x = torch.randn(4096 // n + 1, n, dtype=dtype)
    check_gradients(sample, sample.reference, x, *sample.parameters(n, dtype))


@both
@pytest.mark.parametrize("n", [64, 131])
def test_residual_and_sum(device, dtype, sample, n):
    x, residual = torch.randn(2, 80, n, dtype=dtype)
    parameters = sample.parameters(n, dtype)

    def with_sum(x, residual, *parameters):
        return sample(x, *parameters, residual=residual, return_sum=True)

    def reference(x, residual, *parameters):
        return sample.reference(x + residual, *parameters), x + residual

    out, z = with_sum(x, residual, *parameters)
    assert same_bits(z, x + residual)
    assert same_bits(out, sample(z, *parameters))
    assert same_bits(out, sample(x, *parameters, residual=residual))
    check_gradients(with_sum, reference, x, residual, *parameters)


@both
def test_the_gradient_of_the_sum_alone(sample):
    x, residual = torch.randn(2, 5, 33).requires_grad_()
    _, z = sample(x, *sample.parameters(33, torch.float32), residual=residual, return_sum=True)
    grad = torch.randn(5, 33)
    assert all(same_bits(g, grad) for g in torch.autograd.grad(z, (x, residual), grad))


@both
def test_without_residual_the_sum_is_the_input(sample):
    x, kept = torch.randn(2, 5, 33)
    out, z = sample(x, return_sum=True)
    assert z is x
    assert same_bits(out, sample(x))
    assert sample(x, return_sum=True, out=(out, kept))[1] is kept
    assert same_bits(kept, x)


@both
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=("bf16", "f16"))
def test_a_float32_residual_of_16_bit_activations(device, sample, half):
    """The sum and its gradient are float32, as torch has it."""
    x, residual = torch.randn(80, 64, dtype=half), torch.randn(80, 64)
    parameters = sample.parameters(64, torch.float32)
    leaves = [t.requires_grad_() for t in (x, residual, *parameters)]
    out, z = sample(x, *parameters, residual=residual, return_sum=True)
    with torch.no_grad():
        assert same_bits(z, x + residual)
        assert same_bits(out, sample(z, *parameters).to(half))
        assert same_bits(out, sample(x, *parameters, residual=residual))
    dx, dresidual, *_ = torch.autograd.grad((out, z), leaves, (torch.randn_like(out), torch.randn_like(z)))
    assert (dx.dtype, dresidual.dtype) == (half, torch.float32)
    assert same_bits(dx, dresidual.to(half))


@both
def test_out(device, dtype, sample):
    x, residual = torch.randn(2, 40, 48, dtype=dtype)
    parameters = sample.parameters(48, dtype)
    expected, z = sample(x, *parameters, residual=residual, return_sum=True)
    plain = torch.full_like(x, torch.nan)
    strided = torch.full((2, 48, 80), torch.nan, dtype=dtype)[:, :, ::2].mT
    assert sample(x, *parameters, residual=residual, out=plain) is plain
    written = sample(x, *parameters, residual=residual, return_sum=True, out=tuple(strided))
    for found in (plain, *written[:1], strided[0]):
        assert same_bits(found, expected)
    assert same_bits(strided[1], z)


@both
@pytest.mark.parametrize("n", [48, 131, 9000])
def test_in_place(device, dtype, sample, n):
    x, residual = torch.randn(2, 3, n, dtype=dtype)
    parameters = sample.parameters(n, dtype)
    expected, z = sample(x, *parameters, residual=residual, return_sum=True)
    alone = sample(x, *parameters)
    ours = [t.clone() for t in (x, residual)]
    sample(*ours[:1], *parameters, residual=ours[1], return_sum=True, out=tuple(ours))
    assert same_bits(ours[0], expected)
    assert same_bits(ours[1], z)
    ours = [t.clone() for t in (x, residual)]
    sample(*ours[:1], *parameters, residual=ours[1], return_sum=True, out=tuple(ours[::-1]))
    assert same_bits(ours[1], expected)
    assert same_bits(ours[0], z)
    assert same_bits(sample(x, *parameters, out=x), alone)


def test_out_over_several_dimensions(device, dtype):
    x, out, z = torch.randn(3, 4, 7, 11, dtype=dtype)
    x, out = x.expand(2, 4, 7, 11), torch.empty(4, 2, 7, 22, dtype=dtype)[..., ::2].transpose(0, 1)
    expected = ops.layer_norm(x, (7, 11), residual=x)
    z = torch.empty(2, 11, 4, 7, dtype=dtype).permute(0, 2, 3, 1)
    ops.layer_norm(x, (7, 11), residual=x, return_sum=True, out=(out, z))
    assert same_bits(out, expected)
    assert same_bits(z, x + x)


@both
def test_refusals(sample):
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match=f"{sample.__name__}: with return_sum, out must be two tensors"):
        sample(x, residual=x, return_sum=True, out=x)
    with pytest.raises(TypeError, match=f"{sample.__name__}: out must be a torch.Tensor, not tuple"):
        sample(x, residual=x, out=(x, x))
    with pytest.raises(TypeError, match="eps must be a number"):
        sample.op(x, (3,), eps=torch.tensor(1.0))
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match="out= takes no part in gradients"):
        sample(x, out=torch.empty(2, 3))
    (dx,) = torch.autograd.grad(sample(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{sample.__name__}_backward is forward only"):
        dx.sum().backward()


@both
@pytest.mark.parametrize("dims", [1, 2])
def test_parameters_of_another_dtype(device, dtype, sample, dims):
    """float32 parameters keep float32 gradients."""
    shape = (6, 11)[-dims:]
    x, grad = torch.randn(2, 30, 6, 11, dtype=dtype)
    parameters = [torch.randn(shape).requires_grad_() for _ in range(sample.count)]
    out = sample.op(x, shape, *parameters)
    exact = sample.by_torch(x.double(), shape, *(p.double() for p in parameters))
    ours, truth = (torch.autograd.grad(y, parameters, g) for y, g in ((out, grad), (exact, grad.double())))
    assert out.dtype == dtype
    for found, expected in zip(ours, truth, strict=True):
        assert (found.dtype, found.shape) == (torch.float32, shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@both
def test_gradients_of_some_operands(device, dtype, sample):
    """The same bits whatever else is asked for."""
    leaves = [t.requires_grad_() for t in (torch.randn(40, 33, dtype=dtype), *sample.parameters(33, dtype))]
    grad = torch.randn(40, 33, dtype=dtype)
    every = torch.autograd.grad(sample(*leaves), leaves, grad)
    for i, expected in enumerate(every):
        some = [t.detach() for t in leaves]
        some[i].requires_grad_()
        (found,) = torch.autograd.grad(sample(*some), some[i], grad)
        assert same_bits(found, expected)


@both
@pytest.mark.parametrize("rows", [1, 400])
def test_gradients_on_any_number_of_threads(device, dtype, sample, rows):
    leaves = [
        t.requires_grad_() for t in (torch.randn(rows, 131, dtype=dtype), *sample.parameters(131, dtype))
    ]
    grad = torch.randn(rows, 131, dtype=dtype)

    def gradients(count):
        with threads(count):
            return torch.autograd.grad(sample(*leaves), leaves, grad)

    expected = gradients(1)
    for count in (2, 3):
        assert all(map(same_bits, gradients(count), expected))


@both
def test_gradients_of_any_strides(device, dtype, sample):
    x, residual = torch.randn(2, 40, 131, dtype=dtype)
    parameters = sample.parameters(131, dtype)

    def gradients(layout, grad):
        leaves = [layout(t).detach().requires_grad_() for t in (x, residual, *parameters)]
        out, z = sample(leaves[0], *leaves[2:], residual=leaves[1], return_sum=True)
        return torch.autograd.grad((out, z), leaves, (grad, layout(grad)))

    strided = gradients(lambda t: torch.stack([t, t], -1)[..., 0], x.new_ones(()).expand(40, 131))
    assert all(map(same_bits, strided, gradients(lambda t: t, torch.ones_like(x))))


@both
@pytest.mark.parametrize("n", [4096, 8192, 8200, 9001])
def test_long_rows(device, dtype, sample, n):
    """Past what a GPU's registers hold."""
    x, parameters = torch.randn(16, n, dtype=dtype), sample.parameters(n, dtype)
    check(sample, sample.reference, x, *parameters)
    check_gradients(sample, sample.reference, x, *parameters)


@both
def test_many_short_rows(device, dtype, sample):
    x = torch.randn(1500, 8, dtype=dtype)
    check_gradients(lambda x: sample(x), lambda x: sample.reference(x), x)
    ones = torch.ones(8, dtype=dtype)
    weight = ones.clone().requires_grad_()
    exact = ones.double().requires_grad_()
    out, truth = (f(v, w) for f, v, w in ((sample, x, weight), (sample.reference, x.double(), exact)))
    found, expected = (torch.autograd.grad(y.sum(), w)[0] for y, w in ((out, weight), (truth, exact)))
    torch.testing.assert_close(found.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-3)


@both
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 1)])
def test_gradients_of_small_shapes(device, dtype, sample, shape):
    leaves = [torch.randn(s, dtype=dtype).requires_grad_() for s in (shape, *[shape[1:]] * sample.count)]
    grad = torch.randn(shape, dtype=dtype)
    found = torch.autograd.grad(sample(*leaves), leaves, grad)
    double = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(sample.reference(*double), double, grad.double())
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=8 * torch.finfo(dtype).eps, atol=1e-4)


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_gradient_of_a_broken_row_stays_in_it(device, dtype, sample, value):
    x, grad = torch.randn(2, 3, 40, dtype=dtype)
    parameters = sample.parameters(40, dtype)

    def gradient(x, grad):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(sample(x, *parameters), x, grad)[0]

    clean = gradient(x, grad)
    x[1, 7] = value
    broken = gradient(x, grad)
    assert broken[1].isnan().any()
    assert same_bits(broken[::2], clean[::2])


def test_layers():
    """Constructor, state_dict and gradients of torch.nn."""
    x, residual = torch.randn(2, 5, 33)
    for ours, theirs in ((nn.LayerNorm(33), torch.nn.LayerNorm(33)), (nn.RMSNorm(33), torch.nn.RMSNorm(33))):
        theirs.load_state_dict({k: torch.randn(33) for k in theirs.state_dict()})
        ours.load_state_dict(theirs.state_dict())
        found, expected = ours(x, residual), theirs(x + residual)
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
