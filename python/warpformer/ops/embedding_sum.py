from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_integer
from warpformer.ops._library import dispatch, empty, executor, is_direct, register

SEGMENT = 64  # kSegment of csrc/embedding/op.h


def embedding_sum(
    indices: Sequence[Tensor],
    tables: Sequence[Tensor],
    *,
    padding_idx: Sequence[int | None] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Sum of one row of each table: token, position and segment embeddings in one pass.

        out[...] = sum over i of tables[i][indices[i][...]]

    Args:
        indices: up to four tensors of one shape [...] after broadcasting, int64 or int32.
        tables: as many, [V, C] each with its own V, float32, bfloat16 or float16, any strides.
        padding_idx: of each table the row that gets no gradient, counted from its end if negative; or None.
        out: where the result goes: its shape, any strides, any floating dtype.

    Returns:
        [..., C], contiguous, in the dtype of the first table; or `out`.

    Raises:
        InputError: the shapes do not fit, a dtype is wrong, an index or `padding_idx` is outside its table.
            On a GPU, where indices are not read by the host, an index outside its table makes a row NaN.
        TypeError: an argument is not a tensor.

    Gradients of the tables are dense, and sums in the order of the indices: the same bits every time.
    Source: Devlin et al., "BERT", figure 2; torch.nn.functional.embedding.
    """
    indices, tables = list(indices), list(tables)
    direct = is_direct(*indices, *tables, optional=(out,))
    args = (indices, tables, _padding_rows(padding_idx, tables))
    return _embedding_sum(*args, out) if direct else dispatch("embedding_sum", *args, out=out)


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Rows of a table: `embedding_sum` of one.

        out[...] = weight[input[...]]

    Args:
        input: the indices, [...], int64 or int32.
        weight: [V, C], float32, bfloat16 or float16, any strides.
        padding_idx: the row that gets no gradient, counted from the end if negative; or None.
        out: where the result goes: its shape, any strides, any floating dtype.

    Returns:
        [..., C], contiguous, in the dtype of `weight`; or `out`.

    Raises:
        InputError, TypeError: as `embedding_sum`, under its name.

    Source: torch.nn.functional.embedding.
    """
    return embedding_sum([input], [weight], padding_idx=[padding_idx], out=out)


def _padding_rows(padding_idx, tables):
    """Of each table the row without gradient; -1 where there is none."""
    if padding_idx is None:
        return [-1] * len(tables)
    if len(padding_idx) != len(tables):
        raise _C.InputError(f"embedding_sum: padding_idx = {padding_idx} is not one for each table")
    rows = []
    for row, table in zip(padding_idx, tables, strict=True):
        count = table.shape[0] if table.ndim else 0
        if row is not None:
            check_integer("embedding_sum", "padding_idx", row)
        if row is not None and not -count <= row < count:
            raise _C.InputError(f"embedding_sum: padding_idx = {row} is outside its table of {count} rows")
        rows.append(-1 if row is None else row % count)
    return rows


def _embedding_sum(indices, tables, padding_rows, out=None):
    if not indices or not tables:
        raise _C.InputError("embedding_sum: indices and tables must not be empty")
    with suppress(RuntimeError):  # the op names those that do not broadcast
        indices = torch.broadcast_tensors(*indices)
    if out is None:
        out = _empty_sum(indices, tables)
    _C.embedding_sum(list(indices), list(tables), out, executor(out))
    return out


def _empty_sum(indices, tables):
    return empty((*indices[0].shape, *tables[0].shape[-1:]), tables[0])


def _setup_context(ctx, inputs, output):
    indices, tables, ctx.padding_rows = inputs
    ctx.save_for_backward(*torch.broadcast_tensors(*indices))
    ctx.tables = [(t.shape[0], t.dtype) for t in tables]


def _backward(ctx, grad):
    count = len(ctx.tables)
    wanted = ctx.needs_input_grad[1 + count : 1 + 2 * count]
    each = zip(ctx.saved_tensors, ctx.tables, ctx.padding_rows, wanted, strict=True)
    gradients = [
        dispatch("embedding_sum_backward", grad, index, rows, dtype, padding) if needed else None
        for index, (rows, dtype), padding, needed in each
    ]
    return None, gradients, None


def _embedding_sum_backward(grad, index, rows, dtype, padding):
    dtable = torch.zeros((rows, grad.shape[-1]), dtype=dtype, device=grad.device)
    index, order = torch.sort(index.flatten().long(), stable=True)
    work = empty((2 * -(-len(index) // SEGMENT), grad.shape[-1]), grad, torch.float32)
    grad = grad.reshape(len(index), grad.shape[-1])
    _C.embedding_sum_backward(grad, index, order, dtable, work, padding, executor(grad))
    return dtable


register(
    "embedding_sum(Tensor[] indices, Tensor[] tables, int[] padding_rows) -> Tensor",
    _embedding_sum,
    lambda indices, tables, padding_rows: _empty_sum(torch.broadcast_tensors(*indices), tables),
    setup_context=_setup_context,
    backward=_backward,
    out="Tensor(a!) out",
)
register(
    "embedding_sum_backward(Tensor grad, Tensor index, SymInt rows, ScalarType dtype, int padding) -> Tensor",
    _embedding_sum_backward,
    lambda grad, index, rows, dtype, padding: torch.empty(
        (rows, grad.shape[-1]), dtype=dtype, device=grad.device
    ),
)
