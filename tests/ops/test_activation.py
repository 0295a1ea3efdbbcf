from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.check import check, check_gradients, same_bits, threads
from warpformer import _C, ops

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
EVERY = pytest.mark.parametrize("name", ACTIVATIONS)
CHECKS = pytest.mark.parametrize("check", [check, check_gradients], ids=("forward", "backward"))
RANGES = ((-12, -6), (-6, -4), (-4, -2), (-2, 0), (-1e-3, 1e-3), (0, 2), (2, 6), (6, 1000))


@CHECKS
@EVERY
def test_values(device, dtype, check, name):
    for n in (2, 17, 32, 255):
        x = torch.randn(4096 // n + 1, n, dtype=dtype)
        check(lambda x: ops.activation(x, name), ACTIVATIONS[name], x)


@CHECKS
@EVERY
def test_bias(device, dtype, check, name):
    x, bias = torch.randn(40, 131, dtype=dtype), torch.randn(131, dtype=dtype)
    check(lambda x, b: ops.activation(x, name, bias=b), lambda x, b: ACTIVATIONS[name](x + b), x, bias)


@CHECKS
@EVERY
def test_up(device, dtype, check, name):
    act, n = ACTIVATIONS[name], 131
    x, up = torch.randn(2, 4096 // n + 1, n, dtype=dtype)
    check(lambda x, u: ops.activation(x, name, up=u), lambda x, u: act(x) * u, x, up)
    bias = torch.randn(n, dtype=dtype)
    check(
        lambda x, u, b: ops.activation(x, name, up=u, bias=b),
        lambda x, u, b: act(x + b) * u,
        *(x, up, bias),
    )


def gated(act, z):
    gate, up = z.chunk(2, -1)
    return act(gate) * up


@CHECKS
@EVERY
def test_gated(device, dtype, check, name):
    """Halves of one tensor, with biases of both."""
    act, n = ACTIVATIONS[name], 131
    x, bias = torch.randn(4096 // n + 1, 2 * n, dtype=dtype), torch.randn(2 * n, dtype=dtype)
    check(lambda x: ops.activation(x, name, gated=True), lambda x: gated(act, x), x)
    check(
        lambda x, b: ops.activation(x, name, gated=True, bias=b),
        lambda x, b: gated(act, x + b),
        *(x, bias),
    )


@CHECKS
@EVERY
def test_every_range(device, dtype, check, name):
    for low, high in RANGES:
        x = torch.empty(5000).uniform_(low, high).to(dtype)
        if name.startswith("relu") and high <= 0:
            assert same_bits(ops.activation(x, name), torch.zeros_like(x))
        else:
            check(lambda x: ops.activation(x, name), ACTIVATIONS[name], x)


@EVERY
@pytest.mark.parametrize("copies", [1, 16])  # of each value: the tail of a register, and whole ones
def test_extreme_values(device, dtype, name, copies):
    """The limits, where torch has some of them NaN."""
    huge = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, huge, 100.0, 0.0, -100.0, -huge, -torch.inf, torch.nan], dtype=dtype)
    positive = x.clamp(min=0)
    limit = {"none": x.clone(), "relu2": positive * positive, "tanh": x.sign()}.get(name, positive)
    limit[-1] = torch.nan
    slope = {"none": x - x + 1, "relu2": 2 * positive, "tanh": x == 0}.get(name, x > 0).to(dtype)
    x, limit, slope = (t.repeat_interleave(copies) for t in (x, limit, slope))
    equal = partial(torch.testing.assert_close, rtol=0, atol=1e-30, equal_nan=True)
    equal(ops.activation(x, name), limit)
    x.requires_grad_()
    ops.activation(x, name).sum().backward()
    finite = x.isfinite() if name == "none" else ~x.isnan() & (x != 0)
    equal(x.grad[finite], slope[finite].to(dtype))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,)])
def test_small_shapes(device, dtype, shape):
    x, up = torch.zeros(2, *shape, dtype=dtype).requires_grad_()
    bias = torch.zeros(shape[-1:], dtype=dtype).requires_grad_() if shape else None
    out = ops.activation(x, up=up, bias=bias)
    assert same_bits(out.detach(), torch.zeros(shape, dtype=dtype))
    leaves = [t for t in (x, up, bias) if t is not None]
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert same_bits(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("rows", [1, 31, 33, 300])
def test_bias_gradient_of_any_number_of_rows(device, dtype, rows):
    x, bias = torch.randn(rows, 131, dtype=dtype), torch.randn(131, dtype=dtype)
    check_gradients(lambda x, b: ops.activation(x, "silu", bias=b), lambda x, b: F.silu(x + b), x, bias)


def test_bias_gradient_for_any_number_of_threads(device, dtype):
    x, bias, grad = (torch.randn(shape, dtype=dtype) for shape in ((300, 262), (262,), (300, 131)))

    def gradients():
        leaves = [t.clone().requires_grad_() for t in (x, bias)]
        return torch.autograd.grad(ops.activation(leaves[0], gated=True, bias=leaves[1]), leaves, grad)

    with threads(1):
        expected = gradients()
    for count in (2, 3):
        with threads(count):
            assert all(map(same_bits, gradients(), expected))


@pytest.mark.parametrize("width", [2047, 2049, 5000])
def test_wide_rows(device, dtype, width):
    x, bias = torch.randn(3, width, dtype=dtype), torch.randn(width, dtype=dtype)
    for judge in (check, check_gradients):
        judge(lambda x, b: ops.activation(x, "silu", bias=b), lambda x, b: F.silu(x + b), x, bias)


@pytest.mark.parametrize("needed", ["x", "up", "bias", "x up", "up bias"])
def test_gradients_that_are_not_needed(device, needed):
    operands = {"x": torch.randn(40, 7), "up": torch.randn(40, 7), "bias": torch.randn(7)}

    def gradients(names):
        leaves = {k: v.clone().requires_grad_(k in names) for k, v in operands.items()}
        out = ops.activation(leaves["x"], up=leaves["up"], bias=leaves["bias"])
        return torch.autograd.grad(out.sum(), [leaves[k] for k in names])

    everything = dict(zip(operands, gradients(operands), strict=True))
    names = needed.split()
    for name, gradient in zip(names, gradients(names), strict=True):
        assert same_bits(gradient, everything[name])


def test_mixed_dtypes(device):
    """Each operand and the result in a dtype of its own."""
    x, up, bias = torch.randn(40, 131), torch.randn(40, 131).half(), torch.randn(131).bfloat16()
    exact = F.silu(x.double() + bias.double()) * up.double()
    torch.testing.assert_close(ops.activation(x, "silu", up=up, bias=bias), exact.float())
    assert ops.activation(up, "silu", bias=bias).dtype == torch.float16


@pytest.mark.parametrize("result", [torch.float32, torch.bfloat16, torch.float16])
def test_out(device, dtype, result):
    x, up = torch.randn(2, 40, 131, dtype=dtype)
    expected = ops.activation(x, "silu", up=up)
    wide = torch.full((40, 262), torch.nan, dtype=result)
    for out in (wide[:, :131], wide[:, ::2], wide[:, 131:]):
        assert ops.activation(x, "silu", up=up, out=out) is out
        if result == dtype:
            assert same_bits(out, expected)
        else:
            torch.testing.assert_close(out.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("target", ["x", "up"])
@pytest.mark.parametrize("layout", [lambda t: t, lambda t: t.mT.contiguous().mT], ids=("rows", "columns"))
def test_in_place(device, dtype, target, layout):
    x, up = torch.randn(2, 40, 131, dtype=dtype)
    expected = ops.activation(x, up=up)
    operands = {"x": layout(x), "up": layout(up)}
    assert same_bits(ops.activation(operands["x"], up=operands["up"], out=operands[target]), expected)


def test_signatures_of_torch(device, dtype):
    x = torch.randn(40, 131, dtype=dtype)
    check(ops.silu, F.silu, x)
    check(ops.relu, F.relu, x)
    check(lambda x: ops.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), x)
    for op in (ops.silu, ops.relu):
        expected, copy = op(x), x.clone()
        assert op(copy, True) is copy
        assert same_bits(copy, expected)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **kwargs or {})


def test_gated_gradient_is_one_tensor(device):
    """The kernel writes both halves where they stay: nothing is copied together."""
    x = torch.randn(40, 262, requires_grad=True)
    out = ops.activation(x, "silu", gated=True)
    grad = torch.ones_like(out)
    with Calls() as calls:
        (gradient,) = torch.autograd.grad(out, x, grad)
    assert gradient.is_contiguous()
    assert [name for name in calls.names if name != "aten::detach"] == ["warpformer::activation_backward"]


def test_backward_refuses_by_name():
    x = torch.zeros(2, 3)
    with pytest.raises(_C.InputError, match=r"^activation_backward: .*grad = f32\[3\] cpu, x = f32\[2,3\]"):
        _C.activation_backward(x[0], x, None, None, None, x, None, None, None, None, "gelu", 1)
    with pytest.raises(_C.InputError, match=r"^activation_backward: .*partial = None, dbias = f32\[3\]"):
        _C.activation_backward(x, x, None, x[0], None, x, None, x[0], None, None, "gelu", 1)
