import pytest
import torch
import torch.nn.functional as F

from tests.check import check, check_gradients, host_reads, same_bits
from warpformer import _C, InputError, ops

SIZES = (2, 15, 16, 17, 31, 32, 33, 255, 256, 257)
REDUCTIONS = ("none", "mean", "sum")


def case(dtype, *shape, ignored=-100):
    """Logits, targets of which some are ignored, class weights."""
    x = 2 * torch.randn(shape, dtype=dtype)
    classes = shape[min(1, len(shape) - 1)]
    target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
    if target.ndim:
        target[torch.rand(target.shape) < 0.2] = ignored
    return x, target, torch.rand(classes, dtype=dtype)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values(device, dtype, n, smoothing):
    x, target, weight = case(dtype, 4096, n)
    options = {"reduction": "none", "label_smoothing": smoothing}

    def by_torch(x, w):
        return F.cross_entropy(x, target, None if w is None else w.to(x.dtype), **options)

    for w in (None, weight):
        check(lambda x, w=w: ops.cross_entropy(x, target, w, **options), lambda x, w=w: by_torch(x, w), x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_values_of_many_classes(device, dtype, smoothing):
    x, target, weight = case(dtype, 40, 5000)
    options = {"reduction": "none", "label_smoothing": smoothing}

    def repeated(losses):  # to as many as `check` asks for
        return losses.repeat(-(-4096 // len(losses)))

    for w in (None, weight):
        check(
            lambda x, w=w: repeated(ops.cross_entropy(x, target, w, **options)),
            lambda x, w=w: repeated(
                F.cross_entropy(x, target, None if w is None else w.to(x.dtype), **options)
            ),
            x,
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(300, 33), (3, 33, 70), (5, 40, 3, 7), (9, 257, 2), (5000,)])
def test_gradients(device, dtype, shape, reduction, smoothing, weighted):
    x, target, weight = case(dtype, *shape)
    options = {"reduction": reduction, "label_smoothing": smoothing}

    def by_torch(x):
        return F.cross_entropy(x, target, weight.to(x.dtype) if weighted else None, **options)

    def ours(x):
        return ops.cross_entropy(x, target, weight if weighted else None, **options)

    if reduction == "none" and target.ndim:
        check_gradients(ours, by_torch, x)
    else:  # of a gradient of 1: another one, the same for all, rounds all 16-bit values once more
        check(*(gradient_of(f) for f in (ours, by_torch)), x)


def gradient_of(function):
    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x), x)[0]

    return gradient


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(300, 33), (3, 33, 70)])
def test_z_loss(device, dtype, shape, reduction):
    x, target, weight = case(dtype, *shape)
    x = x + 3

    def by_torch(x):
        w = weight.to(x.dtype)
        rows = F.cross_entropy(x, target, w, reduction="none")
        of_target = torch.where(target < 0, 0, w[target.clamp(min=0)])
        rows = rows + 0.1 * of_target * x.logsumexp(1) ** 2
        return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / of_target.sum()}[reduction]

    def ours(x):
        return ops.cross_entropy(x, target, weight, reduction=reduction, z_loss=0.1)

    if reduction == "none":
        check_gradients(ours, by_torch, x)
    else:
        check(gradient_of(ours), gradient_of(by_torch), x)
    exact = by_torch(x.double())
    out = ops.cross_entropy(x.float(), target, weight.float(), reduction=reduction, z_loss=0.1)
    torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions(device, dtype, reduction):
    x, target, weight = case(torch.float32, 500, 70)
    out = ops.cross_entropy(x.to(dtype), target, weight, reduction=reduction)
    exact = F.cross_entropy(x.to(dtype).double(), target, weight.double(), reduction=reduction)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (0,), (0, 3), (2, 3, 0), (1, 1), (3, 1, 2)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_small_shapes(device, shape, reduction):
    if shape in ((), (0,)):
        with pytest.raises(InputError, match="cross_entropy: "):
            ops.cross_entropy(torch.randn(shape), torch.zeros((), dtype=torch.int64), reduction=reduction)
        return
    x, target, _ = case(torch.float32, *shape)
    leaf = x.clone().requires_grad_()
    out, expected = (
        ops.cross_entropy(leaf, target, reduction=reduction),
        F.cross_entropy(x, target, reduction=reduction),
    )
    torch.testing.assert_close(out.detach(), expected, equal_nan=True)
    assert torch.autograd.grad(out.sum(), leaf)[0].shape == shape


@pytest.mark.parametrize("shape", [(40, 33), (4, 33, 10)])
def test_ignored_rows_may_hold_anything(device, dtype, shape):
    x, target, _ = case(dtype, *shape, ignored=7)
    ignored = (target == 7).unsqueeze(1).expand(x.shape)
    losses, gradients = [], []
    for value in (0.0, torch.nan, torch.inf):
        leaf = x.masked_fill(ignored, value).requires_grad_()
        losses.append(ops.cross_entropy(leaf, target, ignore_index=7))
        gradients += torch.autograd.grad(losses[-1], leaf)
    assert all(same_bits(losses[0], loss) for loss in losses)
    assert all(same_bits(gradients[0], gradient) for gradient in gradients)
    assert (gradients[0][ignored] == 0).all()
    rows = ops.cross_entropy(leaf, target, ignore_index=7, reduction="none")
    assert (rows[target == 7] == 0).all()


def test_all_ignored(device, dtype):
    x = torch.randn(5, 9, dtype=dtype, requires_grad=True)
    target = torch.full((5,), -100)
    for reduction, expected in (("mean", torch.nan), ("sum", 0.0)):
        out = ops.cross_entropy(x, target, reduction=reduction)
        torch.testing.assert_close(out.detach(), torch.tensor(expected, dtype=dtype), equal_nan=True)
        assert (torch.autograd.grad(out, x)[0] == 0).all()


@pytest.mark.parametrize("wrong", [-1, 33, 2**40, -(2**40)])
def test_target_outside_the_classes(device, wrong):
    """Refused; on a GPU, where the host does not read it, its row is NaN and no other."""
    x = torch.randn(40, 33, requires_grad=True)
    target = torch.randint(33, (40,))
    target[7] = wrong
    if host_reads(_C.cross_entropy):
        with pytest.raises(InputError, match=rf"^cross_entropy: .* y = {wrong}, target = i64\[40\] cpu"):
            ops.cross_entropy(x, target)
        return
    rows = ops.cross_entropy(x, target, reduction="none")
    (gradient,) = torch.autograd.grad(rows, x, torch.ones(40))
    others = torch.arange(40) != 7
    assert rows[7].isnan()
    assert gradient[7].isnan().all()
    assert rows[others].isfinite().all()
    assert gradient[others].isfinite().all()


@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_target_dtype_and_strides(device, index):
    x, target, _ = case(torch.float32, 6, 33, 20)
    expected = ops.cross_entropy(x, target)
    target = target.to(index)
    for same in (target, target.mT.contiguous().mT, target.repeat_interleave(2, 1)[:, ::2]):
        assert same_bits(ops.cross_entropy(x, same), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_out(device, dtype, reduction):
    x, target, _ = case(dtype, 6, 33, 20)
    expected = ops.cross_entropy(x.float(), target, reduction=reduction)
    out = torch.empty(expected.shape)
    assert ops.cross_entropy(x, target, reduction=reduction, out=out) is out
    assert same_bits(out, expected)
    if reduction == "none":
        out = torch.empty(20, 12).T[::2]
        assert same_bits(ops.cross_entropy(x, target, reduction=reduction, out=out), expected)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_of_the_result(device, dtype, scale, reduction):
    """Multiplies the gradient, as often as it is asked for."""
    x, target, _ = case(dtype, 40, 33)
    x.requires_grad_()
    out = ops.cross_entropy(x, target, reduction=reduction)
    grad = torch.full_like(out, scale)
    once, again = (torch.autograd.grad(out, x, grad, retain_graph=keep)[0] for keep in (True, False))
    assert same_bits(once, again)
    ones = torch.autograd.grad(ops.cross_entropy(x, target, reduction=reduction), x, torch.ones_like(out))[0]
    assert same_bits(once, ones * scale)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, x, grad)


def test_what_has_no_gradient(device):
    x, target, weight = case(torch.float32, 40, 33)
    loss = ops.cross_entropy(x.requires_grad_(), target)
    with pytest.raises(NotImplementedError, match="no second gradient"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient of weight"):
        ops.cross_entropy(x, target, weight.requires_grad_()).backward()


def test_minus_infinity_among_the_logits(device, dtype):
    """A class that cannot be: probability 0, gradient 0."""
    x, target, _ = case(dtype, 40, 33)
    x[:, 5] = -torch.inf
    target[target == 5] = 6
    x.requires_grad_()
    loss = ops.cross_entropy(x, target)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite()
    assert (gradient[:, 5] == 0).all()
    assert gradient.isfinite().all()


def test_autocast():
    """The loss is not rounded to the dtype of logits, as torch has it."""
    x, y = torch.randn(50, 100).bfloat16().requires_grad_(), torch.randint(100, (50,))
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ops.cross_entropy(x, y), F.cross_entropy(x, y)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(2 * loss, x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)
