"""The two ways to a kernel: straight, and through torch.ops where a transform, a mode or a compiler is on."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.check import same_bits
from tests.samples import FORWARD_ONLY, SAMPLES, WITH_GRADIENT
from warpformer import ops
from warpformer.ops._library import is_direct

every_op = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)


class Recorder(TorchDispatchMode):
    """Remembers the calls of our ops that torch's dispatcher sees."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "warpformer":
            self.calls.append((function, args))
        return function(*args, **kwargs or {})


@every_op
def test_registration(sample):
    call = sample(torch.float32)
    with Recorder() as seen:
        out = call()
    assert same_bits(out, call())
    ((function, args),) = seen.calls
    assert function._schema.name == f"warpformer::{call.op.__name__}"
    torch.library.opcheck(function, args)


@every_op
def test_compile(sample):
    call = sample(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(call.op, fullgraph=True, backend="eager")
    assert same_bits(compiled(*call.args, **call.kwargs), call())


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_fake_tensors(sample, dtype):
    call = sample(dtype)
    expected = call()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not is_direct(mode.from_tensor(torch.randn(3)))
        out = call.map(mode.from_tensor)()
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("sample", WITH_GRADIENT, ids=lambda s: s.__name__)
def test_gradient(sample):
    """Registered as torch wants it, the same by the compiler's way as by autograd's, and without autograd."""
    call, leaves = sample(torch.float32).leaves()
    with Recorder() as seen:
        out = call()
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, grad)
    forward, *backward = seen.calls
    assert backward
    torch.library.opcheck(*forward)
    for function, args in backward:  # first gradients only
        torch.library.opcheck(function, tree_map_only(torch.Tensor, torch.Tensor.detach, args))
    torch._dynamo.reset()
    compiled = torch.compile(call.op, fullgraph=True, backend="aot_eager")(*call.args, **call.kwargs)
    assert all(map(same_bits, torch.autograd.grad(compiled, leaves, grad), gradients))
    with torch.no_grad():
        assert same_bits(call(), out.detach())


@pytest.mark.parametrize("sample", FORWARD_ONLY, ids=lambda s: s.__name__)
def test_no_gradient(sample):
    call = sample(torch.float32).map(lambda t: t.detach().requires_grad_())
    out = call()
    name = call.op.__name__
    with pytest.raises(
        NotImplementedError, match=rf"^warpformer.ops.{name} is forward only: it has no gradient"
    ):
        out.sum().backward()
    with torch.no_grad():
        assert same_bits(call(), out.detach())


@every_op
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_no_forward_gradient(sample):
    """An error, for a missing tangent is a gradient of 0: a wrong one."""
    call = sample(torch.float32)
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"forward only|no forward-mode gradient"),
    ):
        call.map(lambda t: forward_ad.make_dual(t, torch.ones_like(t)))()


def test_direct_where_nobody_listens():
    x = torch.randn(3, 4)
    assert is_direct(x)
    assert is_direct(x, optional=(None, Parameter(x, requires_grad=False)))
    with torch.no_grad():
        assert is_direct(Parameter(x))
    with torch.inference_mode():
        assert is_direct(Parameter(x), torch.randn(3))


def test_not_direct_with_gradient():
    assert not is_direct(torch.randn(3), torch.randn(3, requires_grad=True))
    assert not is_direct(Parameter(torch.randn(3)))


def test_not_direct_for_subclasses():
    class Subclass(torch.Tensor):
        pass

    x = torch.randn(3, 4)
    assert not is_direct(x.as_subclass(Subclass))
    out = ops.softmax(x.as_subclass(Subclass))
    assert type(out) is Subclass
    assert same_bits(out.as_subclass(torch.Tensor), ops.softmax(x))


def test_not_direct_in_a_dispatch_mode():
    with Recorder():
        assert not is_direct(torch.randn(3))


def test_not_direct_in_a_function_mode():
    class Mode(TorchFunctionMode):
        seen = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen += (function,)
            return function(*args, **kwargs or {})

    x = torch.randn(3, 4)
    with Mode() as mode:
        assert not is_direct(x)
        out = ops.softmax(x)
    assert torch.ops.warpformer.softmax in mode.seen
    assert same_bits(out, ops.softmax(x))


def test_direct_with_a_default_device():
    with torch.device("cpu"):
        assert is_direct(torch.randn(3))


def test_not_direct_in_vmap():
    x, direct = torch.randn(3, 4, 5), []

    def function(row):
        direct.append(is_direct(row))
        return ops.softmax(row)

    assert same_bits(torch.func.vmap(function)(x), ops.softmax(x))
    assert direct == [False]


TRANSFORMS = {
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x)[1](torch.tensor(1.0)),
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (x,)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_gradients_are_refused(transform):
    direct = []

    def function(row):
        direct.append(is_direct(row))
        return ops.softmax(row).sum()

    with pytest.raises(NotImplementedError, match=r"softmax has no .* gradient, nor one under torch.func"):
        TRANSFORMS[transform](function, torch.randn(3))
    assert direct == [False]


def test_not_direct_in_forward_mode():
    with forward_ad.dual_level():
        assert not is_direct(torch.randn(3))


def test_not_direct_under_the_profiler():
    x = torch.randn(3, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert not is_direct(x)
        out = ops.softmax(x)
    assert "warpformer::softmax" in {event.key for event in profile.key_averages()}
    assert same_bits(out, ops.softmax(x))


def test_not_direct_while_compiling():
    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        return x + is_direct(x)

    assert torch.equal(function(torch.zeros(3)), torch.zeros(3))


@pytest.mark.parametrize("lazy", [torch._neg_view, lambda x: torch.complex(x, x).conj().imag])
def test_lazily_negated_tensors(lazy):
    """A view whose memory holds the opposite of its values."""
    x = lazy(torch.randn(3, 4))
    assert x.is_neg()
    assert same_bits(ops.softmax(x), ops.softmax(x.resolve_neg()))
