"""How an op reaches its kernel: straight, or through torch's dispatcher where somebody is listening."""

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.nn import Parameter
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves

from warpformer._C import InputError, advise_huge_pages
from warpformer.ops._arguments import refuse_by_schema, refuse_tensor
from warpformer.ops._recording import Recording

_library = torch.library.Library("warpformer", "DEF")
LARGE = 4 << 20  # bytes

# glibc returns freed memory to the system above twice the largest block freed so far, of up to 32 MiB, and
# the system clears and maps it anew, page by page. One of that size, freed untouched, spares outputs this.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


def register(schema, kernel, fake, *, setup_context=None, backward=None, out=None):
    """Makes `kernel` the op `schema` of `torch.ops.warpformer`, with `fake` for its shapes and dtypes.

    Gradients are as torch.library.register_autograd has them: `setup_context(ctx, inputs, output)` saves
    what `backward(ctx, *grads)` needs, which returns one gradient (or None, or for a list a list) per
    input. Outputs that only serve backward are marked non-differentiable there; gradients nobody asked
    for are None. Without `backward` the op is forward only, and says so when a gradient is asked for.

    `out` is the schema of output arguments ("Tensor(a!) out"): `kernel` takes them last, and they make a
    second op, `<name>_out`, which returns nothing.
    """
    name = schema.split("(")[0]
    op = _define(schema, kernel, fake)
    if backward is None:
        refusal = f"warpformer.ops.{name} is forward only: it has no gradient"
    else:
        refusal = f"warpformer.ops.{name} has no forward-mode gradient, nor one under torch.func"
    _differentiate(op, refusal, setup_context, backward)
    if out is not None:
        arguments = schema[schema.index("(") : schema.rindex(") ->")].removeprefix("(")
        op = _define(f"{name}_out({arguments}, {out}) -> ()", _returning_nothing(kernel), lambda *args: None)
        _differentiate(op, f"warpformer.ops.{name}: out= takes no part in gradients", None, None)


def _define(schema, kernel, fake):
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")

    def checked_fake(*args):
        devices = sorted({str(t.device) for t in _tensors(args)})
        if len(devices) > 1:
            raise InputError(f"{name}: the tensors are on several devices: {', '.join(devices)}")
        return fake(*args)

    torch.library.register_fake(f"warpformer::{name}", checked_fake, lib=_library)
    return getattr(torch.ops.warpformer, name).default


def _returning_nothing(kernel):
    def function(*args):
        kernel(*args)

    return function


def _differentiate(op, refusal, setup_context, backward):
    """The op's Autograd key. torch's own register_autograd would lose forward-mode tangents silently."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, sizes, *leaves):
            args = _nest(sizes, leaves)
            with torch._C._AutoDispatchBelowAutograd():
                out = op(*args)
            ctx.sizes = sizes
            ctx.set_materialize_grads(False)
            if setup_context:
                setup_context(ctx, args, out)
            return out

        @staticmethod
        def backward(ctx, *grads):
            if backward is None:
                raise NotImplementedError(refusal)
            return None, *_flatten(ctx.sizes, backward(ctx, *grads))

    def autograd(*args):
        tensors = _tensors(args)
        if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
            raise NotImplementedError(refusal)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            if writes or torch._C._are_functorch_transforms_active():
                raise NotImplementedError(refusal)
            sizes = [len(a) if isinstance(a, list | tuple) else None for a in args]
            return Op.apply(sizes, *_flatten(sizes, args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(op._schema.name.split("::")[1], autograd, "Autograd")


def _flatten(sizes, values):
    """The values with those of lists one by one; None for a list is as many Nones."""
    flat = []
    for size, value in zip(sizes, values, strict=True):
        flat += [value] if size is None else [None] * size if value is None else value
    return flat


def _nest(sizes, leaves):
    leaves = iter(leaves)
    return [next(leaves) if size is None else [next(leaves) for _ in range(size)] for size in sizes]


def _tensors(args):
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def dispatch(name, *args, out=None):
    """Calls the op through the dispatcher; with `out` (a tensor or a tuple) its variant that writes there."""
    if out is not None:
        args, name = (*args, *(out if isinstance(out, tuple) else (out,))), f"{name}_out"
    op = getattr(torch.ops.warpformer, name)
    try:
        found = op(*args)
    except RuntimeError as error:
        if not isinstance(error, InputError) and not torch.compiler.is_compiling():
            refuse_by_schema(op.default, args, error)
        raise
    return found if out is None else out


def empty(shape, like, dtype=None):
    """A fresh contiguous tensor on the device of `like`, in its dtype if none is given."""
    options = {"dtype": dtype or like.dtype, "device": like.device}
    if torch._C._len_torch_dispatch_stack() and not _has_dispatch_mode():
        with torch._C._DisableTorchDispatch():  # a recording has no need to see it
            out = torch.empty(shape, **options)
    else:
        out = torch.empty(shape, **options)
    if type(out) is Tensor and out.nbytes > LARGE and out.is_cpu:
        advise_huge_pages(out)
    return out


def executor(t):
    """What a kernel on the device of `t` runs on: so many threads, or torch's current stream there."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else torch.get_num_threads()


def autocast_dtype(t):
    """What torch.autocast would have products on the device of `t` computed in; None outside of it."""
    if not isinstance(t, Tensor) or not (t.is_cpu or t.is_cuda):  # is_direct or the kernel tells
        return None
    device = t.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_direct(*required, optional=()):
    """Whether nobody but the kernel needs to see this call: plain tensors without gradient, and no mode,
    transform, compiler or profiler active. The dispatcher costs several times the call itself.

    Raises TypeError for what is no tensor (None is fine where optional), with its name in the calling op.
    """
    if torch.compiler.is_compiling():
        return False
    grad = torch.is_grad_enabled()
    plain = True
    for tensors in (required, optional):
        for t in tensors:
            kind = type(t)
            if kind is Tensor or kind is Parameter:
                if (grad and t.requires_grad) or t.is_meta or t.is_neg():
                    plain = False
            elif t is not None or tensors is required:
                if not isinstance(t, Tensor):
                    refuse_tensor(t)
                plain = False
    return (
        plain
        and not _has_dispatch_mode()
        and not _has_function_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not profiler._is_profiler_enabled
    )


def _has_dispatch_mode():
    """A recording is a mode too, but sees direct calls as well."""
    count = torch._C._len_torch_dispatch_stack()
    return count > 0 and any(type(torch._C._get_dispatch_stack_at(i)) is not Recording for i in range(count))


def _has_function_mode():
    """A default device is a mode too, but one that no call with a device of its own needs to pass."""
    count = torch._C._len_torch_function_stack()
    return count > 0 and any(
        type(torch._C._get_function_stack_at(i)) is not DeviceContext for i in range(count)
    )
