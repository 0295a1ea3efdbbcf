"""Rows of tokens on their way to the experts and back.

Token n has k experts: N k places, (n, j) the place n k + j. Rows are sorted by expert: row i is that of place
order[i], and place (n, j) has row places[n, j].
"""

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_integer
from warpformer.ops._library import dispatch, empty, executor, is_direct, register

MAX_EXPERTS = 1024  # kMaxExperts of csrc/moe/op.h


def sort_by_expert(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which `grouped_linear` takes the rows of tokens that have k experts each.

        order = expert_ids.flatten().argsort(stable=True)      row i is that of token order[i] // k
        places = order.argsort().view(N, k)                    its row for the j-th expert of token n
        offsets = expert_ids.flatten().bincount(minlength=num_experts).cumsum(0)

    Args:
        expert_ids: [N, k], int64 or int32, any strides: 0 to E - 1.
        num_experts: E, up to 1024.

    Returns:
        order [N k] int64, places [N, k] int64, and offsets [E] int32: where the rows of each expert end.

    Raises:
        InputError: a shape or dtype does not fit, or an expert is none of 0 to E - 1.
        TypeError: `expert_ids` is not a tensor, or `num_experts` not an int.

    A GPU's ids are not read by the host, so that nothing waits for the device and a CUDA graph can hold it.
    What has no expert there goes behind the rows of the last one, past all offsets: `grouped_linear` makes
    it 0. Forward only. Source: Gale et al., "MegaBlocks" (2022).
    """
    direct = is_direct(expert_ids)
    check_integer("sort_by_expert", "num_experts", num_experts)
    args = (expert_ids, num_experts)
    return _sort_by_expert(*args) if direct else dispatch("sort_by_expert", *args)


def spread_rows(input: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """The row of each token, once for each of its experts, sorted by expert.

        out[i] = input[order[i] // k]

    Args:
        input: [N, C], float32, bfloat16 or float16, any strides.
        order, places: [N k] and [N, k], as `sort_by_expert` returns them.

    Returns:
        [N k, C], contiguous, in the dtype of `input`.

    Raises:
        InputError: a shape or dtype does not fit, or `order` has what is no place. On a GPU, where it is not
            read by the host, that makes a row NaN.
        TypeError: an argument is not a tensor.

    The gradient of `input` is `sum_rows`. Source: Shazeer et al., "Outrageously Large Neural Networks".
    """
    args = (input, order, places)
    return _spread_rows(*args) if is_direct(*args) else dispatch("spread_rows", *args)


def sum_rows(rows: Tensor, weights: Tensor | None, order: Tensor, places: Tensor) -> Tensor:
    """What the experts of each token give, weighted, in one sum.

        out[n] = sum over j of weights[n, j] * rows[places[n, j]]

    Products and sums are float32, each of them rounded, in ascending order of j: a token gives the same bits
    alone and in any batch.

    Args:
        rows: [N k, C], float32, bfloat16 or float16, any strides.
        weights: [N, k], of these dtypes, any strides; 1 if None.
        order, places: [N k] and [N, k], as `sort_by_expert` returns them.

    Returns:
        [N, C], contiguous, in the dtype of `rows`.

    Raises:
        InputError: a shape or dtype does not fit, or `places` has what is no row. On a GPU, where it is not
            read by the host, that makes a token NaN.
        TypeError: an argument is not a tensor.

    `order` serves the gradients, of `rows` and `weights`. Source: Shazeer et al. (2017), equation 1.
    """
    args = (rows, weights, order, places)
    direct = is_direct(rows, order, places, optional=(weights,))
    return _sum_rows(*args) if direct else dispatch("sum_rows", *args)


def _sort_by_expert(expert_ids, num_experts):
    out = _empty_order(expert_ids, num_experts)
    _C.sort_by_expert(expert_ids, *out, executor(expert_ids))
    return out


def _empty_order(expert_ids, num_experts):
    if expert_ids.ndim != 2 or not 0 <= num_experts <= MAX_EXPERTS:
        raise _C.InputError(
            f"sort_by_expert: expert_ids = {list(expert_ids.shape)} is not [N, k], or num_experts = "
            f"{num_experts} is not within 0 to {MAX_EXPERTS}"
        )
    places = empty(expert_ids.shape, expert_ids, torch.int64)
    return (
        empty((expert_ids.numel(),), expert_ids, torch.int64),
        places,
        empty((num_experts,), expert_ids, torch.int32),
    )


def _spread_rows(input, order, places):
    out = _empty_spread(input, order, places)
    _C.spread_rows(input, order, places.shape[1], out, executor(input))
    return out


def _empty_spread(input, order, places):
    _check_places("spread_rows", order, places)
    if input.ndim != 2 or input.shape[0] != places.shape[0]:
        shapes = f"input = {list(input.shape)}, places = {list(places.shape)}"
        raise _C.InputError(f"spread_rows: not a row for each token: {shapes}")
    return empty((places.numel(), input.shape[1]), input)


def _spread_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _spread_backward(ctx, grad):
    return dispatch("sum_rows", grad, None, *ctx.saved_tensors), None, None


def _sum_rows(rows, weights, order, places):
    out = _empty_sum(rows, weights, order, places)
    _C.sum_rows(rows, weights, places, out, executor(rows))
    return out


def _empty_sum(rows, weights, order, places):
    _check_places("sum_rows", order, places)
    if rows.ndim != 2 or rows.shape[0] != places.numel():
        shapes = f"rows = {list(rows.shape)}, places = {list(places.shape)}"
        raise _C.InputError(f"sum_rows: not a row for each place: {shapes}")
    return empty((places.shape[0], rows.shape[1]), rows)


def _check_places(op, order, places):
    if places.ndim != 2 or order.shape != (places.numel(),):
        shapes = f"order = {list(order.shape)}, places = {list(places.shape)}"
        raise _C.InputError(f"{op}: not as sort_by_expert returns them: {shapes}")


def _sum_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _sum_backward(ctx, grad):
    rows, weights, order, places = ctx.saved_tensors
    grad = dispatch("spread_rows", grad, order, places)
    if weights is None:
        return grad, None, None, None
    of_rows = of_weights = None
    if rows.requires_grad:
        of_rows = (grad * weights.flatten()[order, None]).to(rows.dtype)
    if weights.requires_grad:
        of_weights = (rows.float() * grad).sum(1)[places].to(weights.dtype)
    return of_rows, of_weights, None, None


register(
    "sort_by_expert(Tensor expert_ids, SymInt num_experts) -> (Tensor, Tensor, Tensor)",
    _sort_by_expert,
    _empty_order,
)
register(
    "spread_rows(Tensor input, Tensor order, Tensor places) -> Tensor",
    _spread_rows,
    _empty_spread,
    setup_context=_spread_context,
    backward=_spread_backward,
)
register(
    "sum_rows(Tensor rows, Tensor? weights, Tensor order, Tensor places) -> Tensor",
    _sum_rows,
    _empty_sum,
    setup_context=_sum_context,
    backward=_sum_backward,
)
