from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import executor, is_direct, register


def embedding_sum(indices: Sequence[Tensor], tables: Sequence[Tensor]) -> Tensor:
    """Sum of one row of each table: token, position and segment embeddings in one pass.

        out[...] = sum over i of tables[i][indices[i][...]]

    Args:
        indices: up to four tensors of one shape [...] after broadcasting, int64 or int32.
        tables: as many, [V, C] each with its own V, float32, bfloat16 or float16, any strides.

    Returns:
        [..., C], contiguous, in the dtype of the first table.

    Raises:
        InputError: an index is outside its table, the shapes do not fit, a dtype is wrong.
        TypeError: an argument is not a tensor.

    Source: Devlin et al., "BERT", figure 2; torch.nn.functional.embedding.
    """
    indices, tables = list(indices), list(tables)
    if is_direct(*indices, *tables):
        return _embedding_sum(indices, tables)
    return torch.ops.warpformer.embedding_sum(indices, tables)


def _embedding_sum(indices, tables):
    if not indices or not tables:
        raise _C.InputError("embedding_sum: indices and tables must not be empty")
    with suppress(RuntimeError):  # the op names those that do not broadcast
        indices = torch.broadcast_tensors(*indices)
    out = _empty_sum(indices, tables)
    _C.embedding_sum(list(indices), list(tables), out, executor(out))
    return out


def _empty_sum(indices, tables):
    width = tables[0].shape[-1:]
    return torch.empty((*indices[0].shape, *width), dtype=tables[0].dtype, device=tables[0].device)


register(
    "embedding_sum(Tensor[] indices, Tensor[] tables) -> Tensor",
    _embedding_sum,
    lambda indices, tables: _empty_sum(torch.broadcast_tensors(*indices), tables),
)
