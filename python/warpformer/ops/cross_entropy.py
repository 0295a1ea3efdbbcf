import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_type
from warpformer.ops._library import autocast_dtype, dispatch, empty, executor, is_direct, register


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of logits and class indices, without log-probabilities in memory.

        L = log sum_v exp input[v]        nll(v) = L - input[v]        y = target
        row = w[y] ((1 - s) nll(y) + z_loss L^2) + s / V sum_v w[v] nll(v)        s = label_smoothing
        "none": out = row        "sum": out = sum row        "mean": out = sum row / sum w[y]

    Args:
        input: [N, V], [V] or [B, V, ...], float32, bfloat16 or float16, any strides.
        target: the shape of `input` without V, int64 or int32: the class of each row.
        weight: [V], w above; 1 if None. It has no gradient.
        ignore_index: rows with this target have loss and gradient 0, and are in no sum; they may hold NaN.
        reduction: "none", "mean" or "sum".
        label_smoothing: from 0 to 1, the share of the target that all classes get alike.
        z_loss: draws log-normalizers to 0; 1e-4 in PaLM.
        out: where the result goes: its shape, any strides, any floating dtype.

    Returns:
        [], or the shape of `target` for "none", in the dtype of `input`, under torch.autocast float32; or
        `out`. The mean of no row is NaN.

    Raises:
        InputError: a shape or dtype does not fit (probabilities as targets are not served), `reduction` or
            `label_smoothing` is none of the above, a target is no class. On a GPU, where targets are not
            read by the host, the loss and gradient of that row are NaN instead.
        TypeError: an argument is not a tensor.

    Where a gradient is wanted, the forward call computes it, in the dtype of `input`, while a row is in the
    cache; backward multiplies it by that of the result, and costs nothing on the CPU if that is 1. There is
    no second gradient. Source: torch.nn.functional.cross_entropy; Chowdhery et al., "PaLM", 5.
    """
    check_type("cross_entropy", "reduction", reduction, str)
    dtype = None if autocast_dtype(input) is None else torch.float32
    args = (input, target, weight, ignore_index, reduction, label_smoothing, z_loss, dtype)
    if is_direct(input, target, optional=(weight, out)):
        return _cross_entropy(*args, False, out)[0]
    if out is not None:
        return dispatch("cross_entropy", *args, False, out=out)
    wanted = torch.is_grad_enabled() and input.requires_grad
    return dispatch("cross_entropy", *args, wanted)[0]


def _cross_entropy(
    input, target, weight, ignore_index, reduction, label_smoothing, z_loss, dtype, with_gradient, out=None
):
    loss, gradient = _results(input, target, reduction, dtype, with_gradient, out)
    work = empty(target.numel() + 1, input, torch.int64)
    dx = gradient if with_gradient else None
    options = (ignore_index, reduction, label_smoothing, z_loss, executor(input))
    _C.cross_entropy(input, target.contiguous(), weight, loss, dx, work, *options)
    return loss, gradient


def _results(input, target, reduction, dtype, with_gradient, out=None):
    if out is None:
        out = empty(target.shape if reduction == "none" else (), input, dtype)
    return out, empty(input.shape if with_gradient else 0, input)


def _setup_context(ctx, inputs, output):
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)


def _backward(ctx, grad, _):
    if torch.is_grad_enabled():
        raise NotImplementedError("warpformer.ops.cross_entropy has no second gradient")
    if ctx.needs_input_grad[3]:
        raise NotImplementedError("warpformer.ops.cross_entropy has no gradient of weight")
    (gradient,) = ctx.saved_tensors
    if is_direct(gradient, grad) and not torch._C._autograd._get_current_graph_task_keep_graph():
        # Nobody will need the saved tensor again.
        dx = _cross_entropy_backward(gradient, grad, gradient)
    else:
        dx = dispatch("cross_entropy_backward", gradient, grad)
    return dx, *[None] * 8


def _cross_entropy_backward(gradient, grad, out=None):
    if out is None:
        out = empty(gradient.shape, gradient)
    _C.cross_entropy_backward(gradient, grad, out, executor(gradient))
    return out


register(
    "cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, str reduction, "
    "float label_smoothing, float z_loss, ScalarType? dtype, bool with_gradient) -> (Tensor, Tensor)",
    _cross_entropy,
    lambda input, target, weight, ignore_index, reduction, *options: _results(
        input, target, reduction, *options[-2:]
    ),
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out",
)
register(
    "cross_entropy_backward(Tensor gradient, Tensor grad) -> Tensor",
    _cross_entropy_backward,
    lambda gradient, grad: empty(gradient.shape, gradient),
)
