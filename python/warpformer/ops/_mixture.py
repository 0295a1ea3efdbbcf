"""Rows of tokens on their way to the experts and back.

Token n has k experts: N k places, (n, j) the place n k + j. Rows are sorted by expert: row i is that of place
order[i], and place (n, j) has row places[n, j].
"""

import torch
from torch import Tensor

from warpformer.ops._library import dispatch, empty, is_direct, register


def spread_rows(input: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """[N, C] -> [N k, C]: row i is that of the token of place order[i]."""
    args = (input, order, places)
    return _spread_rows(*args) if is_direct(input) else dispatch("spread_rows", *args)


def sum_rows(rows: Tensor, weights: Tensor | None, order: Tensor, places: Tensor) -> Tensor:
    """[N k, C] -> [N, C]: sum_j weights[n, j] rows[places[n, j]], in float32 and in ascending order of j,
    whatever rows there are beside. Weights are 1 if None."""
    args = (rows, weights, order, places)
    direct = is_direct(rows, optional=(weights,))
    return _sum_rows(*args) if direct else dispatch("sum_rows", *args)


def _spread_rows(input, order, places):
    return input.index_select(0, order // places.shape[1])


def _spread_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _spread_backward(ctx, grad):
    return dispatch("sum_rows", grad, None, *ctx.saved_tensors), None, None


def _sum_rows(rows, weights, order, places):
    total = torch.zeros(len(places), rows.shape[1], device=rows.device)
    for j, place in enumerate(places.unbind(1)):
        row = rows.index_select(0, place).float()
        # A product and a sum, each rounded: fused, they would be so in vectors but not in tails.
        total += row if weights is None else row.mul_(weights[:, j, None])
    return total.to(rows.dtype)


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
    "spread_rows(Tensor input, Tensor order, Tensor places) -> Tensor",
    _spread_rows,
    lambda input, order, places: empty((len(order), input.shape[1]), input),
    setup_context=_spread_context,
    backward=_spread_backward,
)
register(
    "sum_rows(Tensor rows, Tensor? weights, Tensor order, Tensor places) -> Tensor",
    _sum_rows,
    lambda rows, weights, order, places: empty((len(places), rows.shape[1]), rows),
    setup_context=_sum_context,
    backward=_sum_backward,
)
