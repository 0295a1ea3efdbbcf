from torch import Tensor

from warpformer import _C
from warpformer.ops._library import dispatch, empty, executor, is_direct, register
from warpformer.ops.softmax import expand


def rope(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    key: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rotary position embedding of a query, and of a key in the same call.

        (a, b) = (a cos - b sin, b cos + a sin) for each of the R/2 pairs (a, b) of every head
        half form:         pair i is (x[i], x[i + R/2])       as GPT-NeoX and Llama have it
        interleaved form:  pair i is (x[2i], x[2i + 1])       as GPT-J and the original have it

    Args:
        input: [..., T, H, D], float32, bfloat16 or float16, any strides: heads before tokens are a
            transposed view, `query.transpose(1, 2)`.
        cos, sin: [P, R/2] float32, contiguous, row p the angles of position p, as `rope_tables` makes
            them; R <= D. Elements from R on stay as they are.
        key: [..., T, G, D] with any number of heads G.
        positions: of the tokens, broadcastable to [..., T], int64 or int32: offsets of rows, left
            padding, decoding. 0, 1, ... T - 1 if None.
        interleaved: the interleaved form, not the half form.
        out: where the result goes: the shape of `input`, any floating dtype and strides, may be `input`;
            with `key` a pair of such.

    Returns:
        The shape and dtype of `input`, contiguous; with `key` a pair of such; `out` if given.

    Raises:
        InputError: a shape or dtype does not fit; on the CPU, a position has no row in the tables. On
            CUDA, where nobody waits for the device to tell, its heads become NaN.
        TypeError: an argument is not a tensor.

    Backward rotates the other way; the tables get no gradient. Source: Su et al., "RoFormer: Enhanced
    Transformer with Rotary Position Embedding".
    """
    outs = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
    args = (input, key, cos, sin, positions, interleaved, False)
    if is_direct(input, cos, sin, optional=(key, positions, *outs)):
        result = _rope(*args, *outs)
    else:
        result = dispatch("rope", *args, out=None if out is None else outs)
    return result if key is not None else result[0]


def _rope(input, key, cos, sin, positions, interleaved, conjugate, out=None, key_out=None):
    outs = _empty_results(input, key) if out is None else (out, key_out)
    if positions is not None:
        positions = expand(positions, input.shape[:-2])
    written = (outs[0], None) if key is None else outs
    _C.rope(input, key, cos, sin, positions, interleaved, conjugate, *written, executor(input))
    return outs


def _empty_results(input, key):
    """The second one is empty where there is no key: an op of torch.library cannot return None."""
    return empty(input.shape, input), input.new_empty(0) if key is None else empty(key.shape, key)


def _setup_context(ctx, inputs, outputs):
    _, key, *tables, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(*tables)
    ctx.has_key = key is not None
    if not ctx.has_key:
        ctx.mark_non_differentiable(outputs[1])


def _backward(ctx, grad, key_grad):
    grads = [grad] + [key_grad] * ctx.has_key
    asked = [g for g in grads if g is not None] + [None]
    results = iter(dispatch("rope", *asked[:2], *ctx.saved_tensors, ctx.interleaved, not ctx.conjugate))
    grads = [None if g is None else next(results) for g in grads]
    return *grads, *[None] * (7 - len(grads))


register(
    "rope(Tensor input, Tensor? key, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, "
    "bool conjugate) -> (Tensor, Tensor)",
    _rope,
    lambda input, key, cos, sin, positions, interleaved, conjugate: _empty_results(input, key),
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out, Tensor(b!)? key_out",
)
