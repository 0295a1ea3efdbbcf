import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_flags
from warpformer.ops._library import dispatch, empty, executor, is_direct, register

PART_ROWS = 32  # at least, of a run of rows whose bias gradients are summed one after the other
MAX_PARTS = 4096
PART_FLOATS = 1 << 20  # at most, of the partial sums of a bias gradient


def activation(
    input: Tensor,
    activation: str = "gelu",
    *,
    up: Tensor | None = None,
    gated: bool = False,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Activation function with the bias addition and the gate of a GLU fused.

        z = input + bias
        out = act(z)                        alone
        out = act(z) * up                   with `up`
        out = act(z[..., :F]) * z[..., F:]  with gated=True

        "gelu": z Phi(z), Phi the distribution function of the normal distribution
        "gelu_tanh": z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
        "silu": z / (1 + e^-z)     "relu": max(z, 0)     "relu2": max(z, 0)^2     "tanh"     "none": z

    So "silu" gives SwiGLU, "gelu" GeGLU and "relu" ReGLU.

    Args:
        input: [..., F], float32, bfloat16 or float16, any strides; with `gated` [..., 2F], what a layer
            of both projections gives. Its gradient then is one tensor too: halves that are passed as
            `input` and `up` get two, which autograd copies together.
        activation: the name of the function.
        up: the shape of `input`; not with `gated`.
        gated: whether the second half of the last dimension multiplies the activated first one.
        bias: [F], with `gated` [2F]; 0 if None.
        out: where the result goes: the shape of the result, any floating dtype and strides; may be
            `input` or `up`.

    Returns:
        [..., F], contiguous, in the dtype of `input`; `out` if given.

    Raises:
        InputError: a shape or dtype does not fit, or the activation is not known.
        TypeError: an argument is not a tensor.

    Backward computes from the inputs anew; the gradient of `bias` is summed in an order that depends on
    its shape alone. Source: torch.nn.functional.gelu, silu, relu, glu; Shazeer, "GLU Variants Improve
    Transformer"; So et al., "Primer".
    """
    check_flags("activation", gated=gated)
    args = (input, up, bias, activation, gated)
    if is_direct(input, optional=(up, bias, out)):
        return _activation(*args, out)
    return dispatch("activation", *args, out=out)


def gelu(
    input: Tensor, approximate: str = "none", *, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`activation` with the signature of torch.nn.functional.gelu: approximate is "none" or "tanh"."""
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in names:
        raise _C.InputError(f'gelu: approximate = {approximate!r} is neither "none" nor "tanh"')
    return activation(input, names[approximate], bias=bias, out=out)


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """`activation` with the signature of torch.nn.functional.silu."""
    check_flags("silu", inplace=inplace)
    return activation(input, "silu", out=input if inplace else None)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`activation` with the signature of torch.nn.functional.relu."""
    check_flags("relu", inplace=inplace)
    return activation(input, "relu", out=input if inplace else None)


def _activation(input, up, bias, activation, gated, out=None):
    operands = _operands(input, up, bias, gated)
    if out is None:
        out = _empty_result(input, up, bias, activation, gated)
    _C.activation(*operands, _with_a_dim(out), activation, executor(input))
    return out


def _empty_result(input, up, bias, activation, gated):
    return empty((*input.shape[:-1], input.shape[-1] // 2) if gated else input.shape, input)


def _operands(input, up, bias, gated):
    """What the kernel takes: x, up, bias, up_bias."""
    if not gated:
        return _with_a_dim(input), _with_a_dim(up), bias, None
    if up is not None:
        raise _C.InputError("activation: with gated=True the second half of input is up; both are given")
    if input.ndim == 0 or input.shape[-1] % 2:
        raise _C.InputError(f"activation: input.shape = {list(input.shape)} has no halves, but gated=True")
    if bias is None:
        return *input.chunk(2, -1), None, None
    if bias.shape != input.shape[-1:]:
        raise _C.InputError(
            f"activation: bias.shape = {list(bias.shape)} is not the end of input.shape = {list(input.shape)}"
        )
    return *input.chunk(2, -1), *bias.chunk(2)


def _with_a_dim(t):
    return t[None] if t is not None and t.ndim == 0 else t


def _activation_backward(grad, input, up, bias, activation, gated, needs):
    gradients = _empty_gradients(grad, input, up, bias, activation, gated, needs)
    x, *operands = _operands(input, up, bias, gated)
    asked = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    if gated:
        dx, dup = (None, None) if asked[0] is None else asked[0].chunk(2, -1)
        dbias, dup_bias = (None, None) if asked[2] is None else asked[2].chunk(2)
    else:
        (dx, dup), dbias, dup_bias = map(_with_a_dim, asked[:2]), asked[2], None
    partial = None if dbias is None else x.new_empty(_parts(x), 2, x.shape[-1], dtype=torch.float32)
    results = (dx, dup, dbias, dup_bias, partial)
    _C.activation_backward(_with_a_dim(grad), x, *operands, *results, activation, executor(x))
    return gradients


def _empty_gradients(grad, input, up, bias, activation, gated, needs):
    """Of input, up and bias; empty where not needed."""
    return tuple(
        empty(t.shape, t) if needed else input.new_empty(0)
        for t, needed in zip((input, up, bias), needs, strict=True)
    )


def _parts(x):
    """Runs of rows that bias gradients are summed over first: a function of the shape alone."""
    width = max(1, x.shape[-1])
    rows = x.numel() // width
    return max(1, min(-(-rows // PART_ROWS), PART_FLOATS // width, MAX_PARTS))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.gated = inputs
    ctx.save_for_backward(*tensors)
    ctx.needs = [t is not None and t.requires_grad for t in tensors]


def _backward(ctx, grad):
    args = (grad, *ctx.saved_tensors, ctx.activation, ctx.gated, ctx.needs)
    gradients = dispatch("activation_backward", *args)
    return *(g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True)), None, None


register(
    "activation_backward(Tensor grad, Tensor input, Tensor? up, Tensor? bias, str activation, bool gated, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    _activation_backward,
    _empty_gradients,
)
register(
    "activation(Tensor input, Tensor? up, Tensor? bias, str activation, bool gated) -> Tensor",
    _activation,
    _empty_result,
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out",
)
