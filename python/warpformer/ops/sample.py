import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import dispatch, empty, executor, is_direct, register

SAMPLE = ("temperature", "top_k", "top_p", "min_p", "typical_p")
PENALTIES = {"repetition": 1.0, "frequency": 0.0, "presence": 0.0}  # and what is none


def sample(
    scores: Tensor,
    draws: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    typical_p: float | Tensor = 1.0,
    tokens: Tensor | None = None,
    first_new: Tensor | None = None,
    repetition: float | Tensor = 1.0,
    frequency: float | Tensor = 0.0,
    presence: float | Tensor = 0.0,
) -> Tensor:
    """The next token of each row: the best one, or one drawn among the best with their probabilities.

        x = scores, less the penalties of `penalize`, in float32
        z = x / temperature                         p = softmax of z over the tokens that are kept
        out = the first v with p_0 + ... + p_v > draws, or of temperature 0 the first of the greatest x

    Each option keeps, of the tokens that those before it have left: `top_k` the k greatest, and what equals
    the last of them; `top_p` the fewest of the greatest whose probabilities reach top_p together, of equal
    ones the last; `min_p` those at least min_p times as likely as the likeliest; `typical_p` the fewest whose
    -log p is nearest to the entropy and whose probabilities reach typical_p together, and what is as near as
    the last of them.

    Args:
        scores: [R, V], float32, bfloat16 or float16, any strides; -inf for what cannot be.
        draws: [R] float64, from 0 to below 1; None: the best token of each row, whatever the options.
        temperature: 0 for the best token.
        top_k, top_p, min_p, typical_p: 0, 1, 0 and 1 for none. Each option is a number, or has one for each
            row: a tensor [R].
        tokens, first_new, repetition, frequency, presence: as `penalize` has them; without `tokens` there
            are no penalties.

    Returns:
        [R] int64.

    Raises:
        InputError: a shape or dtype does not fit, an option is out of its range; there are penalties and no
            tokens; rows, which are named, have no finite score, or one that is NaN or +inf. On CUDA, where
            nobody waits for the device to tell, options are not looked at, and such a row gives -1.
        TypeError: `scores` is not a tensor, or `draws`, `tokens` or `first_new` something else than one.

    Exponentials are float32 and their sums float64, on CUDA whole numbers of 2**-40: the same token for any
    number of threads and in any batch. No row is sorted. Forward only. Source: Holtzman et al., "The Curious
    Case of Neural Text Degeneration" (top-p); Nguyen et al., "Turning Up the Heat" (min-p); Meister et al.,
    "Locally Typical Sampling"; transformers' LogitsWarpers, for their order.
    """
    options = _rows_of("sample", scores, torch.float64, SAMPLE, (temperature, top_k, top_p, min_p, typical_p))
    penalties = _penalties_of("sample", scores, tokens, first_new, (repetition, frequency, presence))
    if draws is not None and isinstance(draws, Tensor):
        if draws.dtype != torch.float64:
            raise _C.InputError(f"sample: draws = {draws.dtype} is not float64")
        draws = draws.view(torch.int64)
    written = tokens, first_new, penalties
    if is_direct(scores, options, optional=(draws, *written)):
        return _sample(scores, draws, options, *written)
    return dispatch("sample", scores, draws, options, *written)


def penalize(
    scores: Tensor,
    tokens: Tensor,
    first_new: Tensor,
    *,
    repetition: float | Tensor = 1.0,
    frequency: float | Tensor = 0.0,
    presence: float | Tensor = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Scores with less for the tokens that a row has already.

        x = x / repetition if x >= 0, else x repetition       of the tokens of a row
        x = x - frequency n - presence                        of those that are n > 0 times among the new

    Args:
        scores: [R, V], float32, bfloat16 or float16, any strides.
        tokens: [R, T] int64; what is not in 0 to V - 1, as padding, does not count.
        first_new: [R] int64: tokens[r, first_new[r]:] are the new ones of row r.
        repetition, frequency, presence: 1, 0 and 0 for none. Each is a number, or has one for each row: a
            tensor [R].
        out: where the result goes: the shape of `scores`, any strides; it may be `scores` itself.

    Returns:
        [R, V] float32, or `out`.

    Raises:
        InputError: a shape or dtype does not fit.
        TypeError: an argument is not a tensor.

    Besides the copy it takes time for T tokens of a row, not V. Forward only. Source: Keskar et al., "CTRL: A
    Conditional Transformer Language Model for Controllable Generation" (repetition); OpenAI's API (the
    others).
    """
    penalties = _rows_of("penalize", scores, torch.float32, PENALTIES, (repetition, frequency, presence))
    tensors = (scores, tokens, first_new, penalties)
    if is_direct(*tensors, optional=(out,)):
        return _penalize(*tensors, out)
    return dispatch("penalize", *tensors, out=out)


def _penalties_of(op, scores, tokens, first_new, values):
    """[R, 3]; None without tokens."""
    if tokens is not None or first_new is not None:
        return _rows_of(op, scores, torch.float32, PENALTIES, values)
    for (name, none), value in zip(PENALTIES.items(), values, strict=True):
        if not isinstance(value, int | float) or value != none:
            raise _C.InputError(f"{op}: {name} is given without tokens and first_new")
    return None


def _rows_of(op, scores, dtype, names, options):
    """[R, options], of numbers and tensors [R]; float64 as its bits."""
    if not isinstance(scores, Tensor) or scores.ndim == 0:
        rows, device = 1, "cpu"  # the op refuses these scores
    else:
        rows, device = scores.shape[0], scores.device
    are_numbers = True
    for name, option in zip(names, options, strict=True):
        if isinstance(option, Tensor):
            are_numbers = False
            if option.shape != (rows,) or option.device != device or option.is_complex():
                shape = list(option.shape)
                raise _C.InputError(f"{op}: {name} = {shape} has no real number for each of {rows} rows")
        elif not isinstance(option, int | float):
            raise TypeError(f"{op}: {name} must be a number or a torch.Tensor, not {type(option).__name__}")
        elif isinstance(option, int) and not -(2**63) <= option < 2**63:
            raise _C.InputError(f"{op}: {name} is an int beyond int64")
    if are_numbers and torch.device(device).type != "cuda":
        values = torch.tensor([options], dtype=dtype, device=device).expand(rows, -1)
    else:  # a CUDA graph holds no copy from the host
        values = torch.stack([torch.zeros(rows, dtype=dtype, device=device).add_(o) for o in options], 1)
    return values.view(torch.int64) if dtype == torch.float64 else values


def _sample(scores, draws, options, tokens, first_new, penalties):
    out, scratch = _empty_tokens(scores), None if penalties is None else _empty_scores(scores)
    _C.sample(scores, draws, options, tokens, first_new, penalties, scratch, out, executor(scores))
    return out


def _empty_tokens(scores, *_):
    return empty(scores.shape[:1], scores, torch.int64)


def _penalize(scores, tokens, first_new, penalties, out=None):
    if out is None:
        out = _empty_scores(scores)
    _C.penalize(scores, tokens, first_new, penalties, out, executor(scores))
    return out


def _empty_scores(scores, *_):
    return empty(scores.shape, scores, torch.float32)


register(
    "sample(Tensor scores, Tensor? draws, Tensor options, Tensor? tokens, Tensor? first_new,"
    " Tensor? penalties) -> Tensor",
    _sample,
    _empty_tokens,
)
register(
    "penalize(Tensor scores, Tensor tokens, Tensor first_new, Tensor penalties) -> Tensor",
    _penalize,
    _empty_scores,
    out="Tensor(a!) out",
)
