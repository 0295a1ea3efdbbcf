import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_integer
from warpformer.ops._library import dispatch, empty, executor, is_direct, register


def top_k(scores: Tensor, k: int, *, log_softmax: bool = False) -> tuple[Tensor, Tensor]:
    """The k greatest of each row, the greatest first and of equal ones the first first.

        values, indices = scores.sort(dim=-1, descending=True, stable=True), the first k
        with `log_softmax`          values = log_softmax(scores, -1).gather(-1, indices)

    Args:
        scores: [R, V], float32, bfloat16 or float16, any strides; NaN is greater than all.
        k: from 1 to V.
        log_softmax: whether the values are log-probabilities, of logits.

    Returns:
        values [R, k] float32, and indices [R, k] int64.

    Raises:
        InputError: a shape or dtype does not fit, or k is out of its range.
        TypeError: `scores` is not a tensor, or k not an int.

    A row is read once, and no more of it is sorted than blocks of 64 whose greatest is among the k greatest
    ones of blocks; no log-probability but those of the k is computed. Forward only. Source: torch.topk, which
    has any order of equal ones.
    """
    direct = is_direct(scores)
    check_integer("top_k", "k", k)
    return _top_k(scores, k, log_softmax) if direct else dispatch("top_k", scores, k, log_softmax)


def _top_k(scores, k, log_softmax):
    out = _empty_results(scores, k)
    _C.top_k(scores, k, log_softmax, *out, executor(scores))
    return out


def _empty_results(scores, k, log_softmax=False):
    if scores.ndim != 2 or not 0 <= k <= scores.shape[1]:
        raise _C.InputError(f"top_k: of scores = {list(scores.shape)} there are no k = {k} of each row")
    shape = scores.shape[0], k
    return empty(shape, scores, torch.float32), empty(shape, scores, torch.int64)


register("top_k(Tensor scores, int k, bool log_softmax) -> (Tensor, Tensor)", _top_k, _empty_results)
