"""Runs of rows, one for each expert, and what torch makes of them on a GPU: dense products and sums.

Offsets on a GPU are not looked at where torch has a kernel for all runs together. They are then made to
ascend from 0 to M: one below an earlier one counts as that one. Rows past the last one are those of no
expert.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import empty
from warpformer.ops.activation import _activation

PART_ROWS = 32


def runs_of(offsets: Tensor, experts: int, count: int) -> list[slice]:
    """The rows of each expert, by a look at the offsets, which waits for a GPU."""
    ends = offsets.tolist()
    integers = offsets.dtype in (torch.int32, torch.int64) and offsets.shape == (experts,)
    if not integers or [0, *ends, count] != sorted([0, *ends, count]) or max(ends, default=0) != count:
        kind = f"{str(offsets.dtype).removeprefix('torch.')}{list(offsets.shape)}"
        raise _C.InputError(
            f"grouped_linear: offsets = {ends!s:.80} ({kind}) do not ascend to {count}, an "
            f"integer for each of {experts} experts"
        )
    return [slice(*run) for run in pairwise([0, *ends])]


def linear(input, weight, offsets, bias=None, activation="none", gated=False):
    """grouped_linear of a plain weight."""
    dtype = torch.promote_types(input.dtype, weight.dtype)
    a, w = input.to(dtype), weight.to(dtype)
    has_kernel = _has_kernel(a, w)
    if has_kernel:
        ends = _ascending(offsets, len(weight), len(input))
        z = F.grouped_mm(a, w.mT, offs=ends)
        rows = torch.arange(len(a), device=a.device, dtype=torch.int32)
        experts = torch.searchsorted(ends, rows, right=True)
        if bias is not None:
            z += bias.to(dtype).index_select(0, experts.clamp(max=len(weight) - 1))
    else:
        z = empty((len(a), weight.shape[1]), a)
        for e, rows in enumerate(runs_of(offsets, len(weight), len(a))):
            z[rows] = F.linear(a[rows], w[e], None if bias is None else bias[e].to(dtype))
    if gated or activation != "none":
        z = _activation(z, None, None, activation, gated)
    if has_kernel:
        z.masked_fill_((experts == len(weight))[:, None], 0)
    return z.to(input.dtype)


def outer_product(a, b, offsets, dtype):
    """grouped_outer_product."""
    common, experts = torch.promote_types(a.dtype, b.dtype), len(offsets)
    a, b = a.to(common).contiguous(), b.to(common).contiguous()
    if _has_kernel(a, b):
        ends = _ascending(offsets, experts, len(a))
        out = F.grouped_mm(a.mT, b, offs=ends)
        none = ends == F.pad(ends, (1, 0))[:-1]  # whose products of no rows torch does not promise
        return out.masked_fill_(none[:, None, None], 0).to(dtype)
    out = empty((experts, a.shape[1], b.shape[1]), a, common)
    for rows, of_expert in zip(runs_of(offsets, experts, len(a)), out, strict=True):
        torch.mm(a[rows].mT, b[rows], out=of_expert)
    return out.to(dtype)


def sum_rows(input, offsets, dtype):
    """grouped_sum: of parts of at most 32 rows, in more bits than those of `dtype`, then of each expert's
    parts. A thread has a column of a part, so that parts are threads, and each sum has one order."""
    ends = _ascending(offsets, len(offsets), len(input))
    if input.numel() == 0:
        return torch.zeros(len(ends), input.shape[1], dtype=dtype, device=input.device)
    cuts = torch.arange(PART_ROWS, len(input), PART_ROWS, dtype=torch.int32, device=ends.device)
    ends_of_parts = torch.cat([ends, cuts]).sort().values
    wide = input.to(torch.float64 if dtype == torch.float32 else torch.float32)
    parts = _segment_sums(wide, ends_of_parts).double()
    return _segment_sums(parts, torch.searchsorted(ends_of_parts, ends, right=True)).to(dtype)


def _segment_sums(rows, ends):
    return torch.segment_reduce(rows, "sum", offsets=F.pad(ends.long(), (1, 0)), axis=0, unsafe=True)


def _ascending(offsets, experts, count):
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (experts,):
        kind = f"{str(offsets.dtype).removeprefix('torch.')}{list(offsets.shape)}"
        raise _C.InputError(
            f"grouped_linear: offsets = {kind} are no integers, one for each of {experts} experts"
        )
    return offsets.clamp(0, count).cummax(0).values.int()


def _has_kernel(a, b):
    """Whether torch's grouped_mm takes them: bfloat16, and every row at a multiple of 16 bytes. (On GPUs that
    are neither sm_90 nor sm_100 it looks at the offsets itself.)"""
    plain = all(
        t.dtype == torch.bfloat16
        and t.numel() > 0
        and t.data_ptr() % 16 == 0
        and 1 in t.stride()[-2:]
        and all(stride % 8 == 0 for stride in t.stride() if stride != 1)
        for t in (a, b)
    )
    return plain and len(a) < 2**31
