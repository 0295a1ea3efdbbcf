import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_flags
from warpformer.ops._library import dispatch, empty, executor, is_direct, register


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    residual: Tensor | None = None,
    seed: int | Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Dropout, with the residual addition fused.

        out[i] = residual[i] + (input[i] / (1 - p) if word i of the seed's random words >= p 2^32 else 0)

    Args:
        input: any shape, float32, bfloat16 or float16, any strides.
        p: the probability of 0, in [0, 1].
        training: if False, p is 0.
        residual: the shape of `input`; 0 if None.
        seed: an int64, as a number or as a tensor of one element on the device of `input`; drawn from
            torch's generator of that device if None. It stays there, so that a CUDA graph draws anew at
            every replay.
        out: where the result goes: the shape of `input`, any floating dtype and strides; may be `input`
            or `residual`.

    Returns:
        A contiguous tensor of the shape and dtype of `input` (`input` itself where nothing is to be
        done, as torch has it); `out` if given. What is dropped leaves nothing, NaN included.

    Raises:
        InputError: a shape, dtype or device does not fit, or `p` is no probability.
        TypeError: an argument is not a tensor.

    Element i, counted in row-major order whatever the strides, takes word i % 4 of counter i / 4 of
    Philox4x32-10: the same mask on every device, for any number of threads. Backward draws the mask
    again from the seed. Source: torch.nn.functional.dropout; Salmon et al., "Parallel Random Numbers: As
    Easy as 1, 2, 3".
    """
    check_flags("dropout", training=training)
    if not training:
        if residual is None and out is None:
            is_direct(input)  # refuses what is no tensor
            return input
        p, seed = 0.0, 0
    seed = seed_tensor(seed, input)
    if is_direct(input, seed, optional=(residual, out)):
        return _dropout(input, residual, seed, p, out)
    return dispatch("dropout", input, residual, seed, p, out=out)


def seed_tensor(seed, input, op="dropout"):
    """`seed`, as ops take it, on the device of `input`."""
    if isinstance(seed, Tensor):
        return seed
    device = input.device if isinstance(input, Tensor) else None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), device=device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{op}: seed must be an int or a torch.Tensor, not {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise _C.InputError(f"{op}: seed = {seed} is not an int64")
    return torch.full((), seed, dtype=torch.int64, device=device)


def _dropout(input, residual, seed, p, out=None):
    if out is None:
        out = empty(input.shape, input)
    operands = [input, residual, out]
    if input.ndim == 0:
        operands = [t if t is None else t[None] for t in operands]
    x, r, y = operands
    _C.dropout(x, r, seed, p, y, executor(input))
    return out


def _setup_context(ctx, inputs, output):
    _, residual, seed, ctx.p = inputs
    ctx.save_for_backward(seed)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad):
    (seed,) = ctx.saved_tensors
    residual = None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype)
    return dispatch("dropout", grad, None, seed, ctx.p), residual, None, None


register(
    "dropout(Tensor input, Tensor? residual, Tensor seed, float p) -> Tensor",
    _dropout,
    lambda input, residual, seed, p: empty(input.shape, input),
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out",
)
