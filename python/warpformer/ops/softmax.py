import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_type
from warpformer.ops._library import dispatch, empty, executor, is_direct, register

PARTS = 256  # sums that the gradient of a mask is made of, at least, where it has so many rows
PART_ROWS = 1024  # in one of them, at most


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    dtype: torch.dtype | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
    is_causal: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Softmax along one dimension, with scale and masks fused.

        z = scale * input + mask          out = exp(z - max z) / sum exp(z - max z)

    Args:
        input: any shape, float32, bfloat16 or float16, any strides.
        dim: the dimension that sums to 1.
        dtype: of the result; that of `out`, or of `input`, if None.
        mask: broadcastable to `input`; bool (True = keep) or additive float.
        scale: multiplies `input` before the mask is added.
        is_causal: of [..., T, S], `dim` the last: row t keeps the elements 0 to t, and reads no others.
        out: where the result goes: the shape of `input`, any strides; it may be `input` itself.

    Returns:
        A contiguous tensor of the shape of `input`, or `out`. An element that is not kept (bool False, float
        -inf, later than a causal row) is 0 whatever `input` has there, and so is a row that keeps nothing.

    Raises:
        InputError: `input` is not floating point, `mask` does not broadcast, `dim` is out of range or not
            that of `is_causal`, `out` has another shape or dtype.
        TypeError: an argument is not a tensor.

    Sums are float32. Gradients, of `input` and an additive `mask`, come from the result alone; elements that
    are not kept take no part in them: their gradient is 0.
    Source: torch.nn.functional.softmax; "Attention Is All You Need", 3.2.1.
    """
    args = (input, mask, dim, scale, is_causal, result_dtype("softmax", dtype, out))
    if is_direct(input, optional=(mask, out)):
        return _softmax(*args, out)
    return dispatch("softmax", *args, out=out)


def result_dtype(name, dtype, out):
    check_type(name, "dtype", dtype, torch.dtype)
    if isinstance(out, Tensor) and dtype not in (None, out.dtype):
        raise _C.InputError(f"{name}: dtype = {dtype} is not that of out = {out.dtype}")
    return dtype


def _softmax(input, mask, dim, scale, is_causal, dtype, out=None):
    return run(_C.softmax, input, mask, dim, scale, is_causal, dtype, out)


def run(kernel, input, mask, dim, scale, is_causal, dtype, out):
    if out is None:
        out = empty(input.shape, input, dtype)
    if mask is not None:
        mask = expand(mask, input.shape)
    x, y = (input, out) if input.ndim else (input[None], out[None])
    if mask is not None and mask.ndim == 0:
        mask = mask[None]
    kernel(x, mask, y, dim, scale, is_causal, executor(input))
    return out


def expand(mask, shape):
    """`mask` broadcast to `shape`; itself where it does not, for the op to refuse by name."""
    try:
        return mask.expand(shape)
    except RuntimeError:
        return mask


def fake(input, mask, dim, scale, is_causal, dtype):
    return torch.empty(input.shape, dtype=dtype or input.dtype, device=input.device)


def setup_context(ctx, inputs, output):
    input, mask, ctx.dim, ctx.scale, _, _ = inputs
    ctx.save_for_backward(output)
    ctx.dtype = input.dtype
    ctx.mask = ([], input.dtype) if mask is None else (mask.shape, mask.dtype)


def backward_by(name):
    """`backward` of the op whose gradient is the op `name`."""

    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:3]
        dx, dmask = dispatch(name, grad, out, ctx.dim, ctx.scale, ctx.dtype, *ctx.mask, wanted)
        return dx if wanted[0] else None, dmask if wanted[1] else None, None, None, None, None

    return backward


def _softmax_backward(*args):
    return run_backward(_C.softmax_backward, *args)


def run_backward(kernel, grad, out, dim, scale, dtype, mask_shape, mask_dtype, wanted):
    dx, dmask = fake_backward(grad, out, dim, scale, dtype, mask_shape, mask_dtype, wanted)
    given, threads = dx if wanted[0] else None, executor(out)
    if out.ndim == 0:
        grad, out, given = (None if t is None else t[None] for t in (grad, out, given))
    dim %= out.ndim
    widths = (1,) * (out.ndim - len(mask_shape)) + tuple(mask_shape)
    # A shift of all of z changes nothing: of a mask that is the same along `dim` the gradient is 0.
    if not wanted[1] or widths[dim] != out.shape[dim] or out.shape[dim] == 1 or out.numel() == 0:
        dmask.zero_()
        if wanted[0]:
            kernel(grad, out, given, None, None, dim, scale, threads)
        return dx, dmask
    # Rows that share one of the mask become neighbours.
    outer = [d for d in range(out.ndim) if d != dim]
    order = [*sorted(outer, key=lambda d: widths[d] != out.shape[d]), dim]
    grad, out, given = (None if t is None else t.permute(order) for t in (grad, out, given))
    rows = dmask.view(widths).movedim(dim, -1)
    in_place = rows.is_contiguous()
    flat = rows.view(-1, rows.shape[-1]) if in_place else empty(rows.flatten(0, -2).shape, dmask)
    shared = out.numel() // flat.numel()
    count = min(shared, max(-(-PARTS // len(flat)), -(-shared // PART_ROWS)))
    parts = empty((count, *flat.shape), dmask, torch.float32)
    kernel(grad, out, given, flat, parts, -1, scale, threads)
    if not in_place:
        rows.copy_(flat.view(rows.shape))
    return dx, dmask


def fake_backward(grad, out, dim, scale, dtype, mask_shape, mask_dtype, wanted):
    return (
        empty(out.shape if wanted[0] else 0, out, dtype),
        empty(mask_shape if wanted[1] else 0, out, mask_dtype),
    )


FORWARD = "(Tensor input, Tensor? mask, int dim, float scale, bool is_causal, ScalarType? dtype) -> Tensor"
BACKWARD = (
    "(Tensor grad, Tensor out, int dim, float scale, ScalarType dtype, SymInt[] mask_shape, "
    "ScalarType mask_dtype, bool[] wanted) -> (Tensor, Tensor)"
)

register(
    f"softmax{FORWARD}",
    _softmax,
    fake,
    setup_context=setup_context,
    backward=backward_by("softmax_backward"),
    out="Tensor(a!) out",
)
register(f"softmax_backward{BACKWARD}", _softmax_backward, fake_backward)
