"""How an op reaches its kernel: straight, or through torch's dispatcher where somebody is listening."""

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from warpformer._C import InputError

_library = torch.library.Library("warpformer", "DEF")
_PLAIN = (Tensor, Parameter)


def register(schema, kernel, fake):
    """Makes `kernel` the op `schema` of `torch.ops.warpformer`, with `fake` for its shapes and dtypes."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    op = getattr(torch.ops.warpformer, name).default

    def checked_fake(*args):
        devices = sorted({str(t.device) for t in _tensors(args)})
        if len(devices) > 1:
            raise InputError(f"{name}: the tensors are on several devices: {', '.join(devices)}")
        return fake(*args)

    def autograd(*args):
        if torch._C._are_functorch_transforms_active() and any(map(_has_gradient, _tensors(args))):
            raise NotImplementedError(_forward_only(name))
        with torch._C._AutoDispatchBelowAutograd():
            out = op(*args)
        return _ForwardOnly.apply(name, out, *_tensors(args))

    torch.library.register_fake(f"warpformer::{name}", checked_fake, lib=_library)
    _library.impl(name, autograd, "Autograd")


def _tensors(args):
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def _has_gradient(t):
    return t.requires_grad or forward_ad.unpack_dual(t).tangent is not None


def _forward_only(name):
    return f"warpformer.ops.{name} is forward only: it has no gradient"


class _ForwardOnly(torch.autograd.Function):
    """Ties an op's output to its inputs, so that asking for a gradient is an error and not a silent zero."""

    @staticmethod
    def forward(name, out, *inputs):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(_forward_only(ctx.name))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_forward_only(ctx.name))


def is_direct(*required, optional=()):
    """Whether nobody but the kernel needs to see this call: plain tensors without gradient, and no mode,
    transform, compiler or profiler active. The dispatcher costs several times the call itself.

    Raises TypeError for what is no tensor (None is fine where optional), with its name in the calling op.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    plain = True
    for t in (*required, *(t for t in optional if t is not None)):
        if type(t) not in _PLAIN:
            if not isinstance(t, Tensor):
                _refuse(t)
            plain = False
        elif (grad and t.requires_grad) or t.is_meta or t.is_neg():
            plain = False
    return (
        plain
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not profiler._is_profiler_enabled
    )


def _refuse(value):
    caller = sys._getframe(2)
    arguments = caller.f_locals.items()
    names = [name for name, argument in arguments if argument is value]
    sequences = [(name, parts) for name, parts in arguments if isinstance(parts, list | tuple)]
    names += [name for name, parts in sequences if any(part is value for part in parts)]
    name = names[0]
    raise TypeError(f"{caller.f_code.co_name}: {name} must be a torch.Tensor, not {type(value).__name__}")
