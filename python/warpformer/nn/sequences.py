from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from warpformer._C import InputError


@dataclass(frozen=True)
class Sequences:
    """Whose tokens the rows [N, C] of a packed batch are: sequences one after the other, without padding.

    Attributes:
        cu_seqlens: [B + 1] int32, where each begins, and N.
        positions: [N] int64 or int32, of each token in its sequence.
        longest: tokens of the longest, those of a cache included; the host knows it without waiting.
        shape: (B, T) of the padded batch.
        kept: [B, T] bool, where that has tokens; None if everywhere.
        cache: the KVCache of the sequences.
        held: [B] int32, earlier tokens of each sequence, which the cache holds; None without a cache.
        totals: [B] int32, those and the new ones.
        is_first: whether there are no earlier tokens.
    """

    cu_seqlens: Tensor
    positions: Tensor
    longest: int
    shape: tuple[int, int]
    kept: Tensor | None = None
    cache: "KVCache | None" = None  # noqa: F821, it is made of Sequences
    held: Tensor | None = None
    totals: Tensor | None = None
    is_first: bool = True

    @classmethod
    def of_batch(
        cls,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache=None,
    ) -> "Sequences":
        """Those of a padded batch.

        Args:
            tokens: [B, T, ...].
            attention_mask: [B, T'], T' >= T: its last T columns tell tokens (not 0) from padding, which may
                be anywhere in a row. All are tokens if None.
            position_ids: broadcastable to [B, T]. If None they count the tokens of a row, from those that
                `cache` holds on.
            cache: a KVCache, which then has room for the tokens; `cache.advance` counts them.

        Raises:
            InputError: a shape does not fit, `cache` is that of another batch, or a gradient is asked for
                beside it.
        """
        shape = tuple(tokens.shape[:2])
        device = tokens.device
        kept = None if attention_mask is None else _last_columns(attention_mask, shape) != 0
        if kept is not None and kept.is_cpu and kept.all():
            kept = None
        counts = shape[1] if kept is None else kept.sum(1)
        starts = _starts(counts, shape[0], device)
        past = 0 if cache is None else cache.longest
        held = totals = None
        if cache is not None:
            cache.begin(counts if kept is None else counts.cpu().numpy(), shape[0], device)
            held = cache.lengths
            totals = (held + counts).int()
        if position_ids is None:
            positions = _positions(shape, kept, held if past else None, device)
        else:
            positions = _expanded("position_ids", position_ids, shape)
        positions = positions.flatten() if kept is None else positions[kept]
        longest = past + shape[1] if kept is None or cache is None else cache.next_longest
        if position_ids is not None and len(positions):
            longest = max(longest, int(positions.max()) + 1)
        return cls(starts, positions, longest, shape, kept, cache, held, totals, not past)

    @classmethod
    def of_lengths(cls, cu_seqlens: Tensor, positions: Tensor, longest: int) -> "Sequences":
        """Those of rows that are packed already."""
        return cls(cu_seqlens, positions, longest, (len(cu_seqlens) - 1, longest))

    def pack(self, padded: Tensor) -> Tensor:
        """[N, ...] of [B, T, ...]."""
        return padded.flatten(0, 1) if self.kept is None else padded[self.kept]

    def pad(self, rows: Tensor) -> Tensor:
        """[B, T, ...] of [N, ...], 0 where there is padding."""
        if self.kept is None:
            return rows.unflatten(0, self.shape)
        padded = rows.new_zeros(*self.shape, *rows.shape[1:])
        padded[self.kept] = rows
        return padded

    def of_tokens(self, values: Tensor) -> Tensor:
        """[N], for each token the value that its sequence has in `values` [B]."""
        batch, longest = self.shape
        if len(self.positions) == batch * longest:
            return values[:, None].expand(self.shape).flatten()
        return values.repeat_interleave(self.cu_seqlens.diff())

    def first(self) -> Tensor:
        """[B] int64: the row of the first token of each sequence."""
        return self.cu_seqlens[:-1].long()

    def last(self, count: int = 1) -> tuple[Tensor, Tensor | None]:
        """[B, count] int64: the rows of the last tokens of each sequence, and where there are so many."""
        rows = self.cu_seqlens[1:, None] - torch.arange(count, 0, -1, device=self.cu_seqlens.device)
        there = rows >= self.cu_seqlens[:-1, None]
        return rows.clamp(min=0).long(), None if self.kept is None and count <= self.shape[1] else there


def _starts(counts, batch, device):
    """[B + 1] int32: 0, and where each sequence ends."""
    if isinstance(counts, int):
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * counts
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _positions(shape, kept, held, device):
    """[B, T], behind those that are held."""
    if held is not None and shape[1] == 1:
        return held[:, None]  # also where there is no token
    new = torch.arange(shape[1], device=device).expand(shape) if kept is None else kept.cumsum(1) - 1
    return new if held is None else new + held[:, None]


def _last_columns(mask, shape):
    if mask.ndim != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        raise InputError(f"attention_mask = {list(mask.shape)} is no mask of tokens = {list(shape)}")
    return mask[:, mask.shape[1] - shape[1] :]


def _expanded(name, t, shape):
    try:
        return t.expand(shape)
    except RuntimeError:
        raise InputError(f"{name} = {list(t.shape)} does not fit tokens = {list(shape)}") from None
