"""How an op reaches its kernel: straight, or through torch's dispatcher where somebody is listening."""

import sys

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter

_library = torch.library.Library("warpformer", "DEF")
_PLAIN = (Tensor, Parameter)


def register(schema, kernel, fake):
    """Makes `kernel` the op `schema` of `torch.ops.warpformer`, with `fake` for its shapes and dtypes."""
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"warpformer::{name}", fake, lib=_library)

    def backward(ctx, *grads):
        raise NotImplementedError(f"warpformer.ops.{name} is forward only: it has no gradient")

    torch.library.register_autograd(f"warpformer::{name}", backward, lib=_library)


def is_direct(*tensors):
    """Whether nobody but the kernel needs to see this call: plain tensors without gradient, and no mode,
    transform, compiler or profiler active. The dispatcher costs several times the call itself.

    Raises TypeError for what is neither a tensor nor None, with the name it has in the calling op.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    plain = True
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN:
            if not isinstance(t, Tensor):
                _refuse(t)
            plain = False
        elif (grad and t.requires_grad) or t.is_meta:
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
    name = next((k for k, v in caller.f_locals.items() if v is value), "an element")
    raise TypeError(
        f"{caller.f_code.co_name}: {name} must be a torch.Tensor, not {type(value).__name__}"
    )
