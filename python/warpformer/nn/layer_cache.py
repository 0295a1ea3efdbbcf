from typing import NamedTuple

import torch
from torch import Tensor

from warpformer import ops
from warpformer.nn.block_pool import BlockPool
from warpformer.nn.sequences import Sequences
from warpformer.ops._library import empty

MEMORY = "memory"


class LayerCache:
    """Keys and values of one attention layer, in blocks: block and slot of each token are told by the KVCache
    that the layer is of, `sequences.cache`.

    Args:
        window: tokens before its own that a query sees, None for all.
        of_memory: the keys and values are those of a memory, which all tokens of a sequence attend to.
        value_width: the values are the first so many numbers of the keys, and are not stored.

    Attributes:
        keys: [blocks, block_size, G, D]; None before the first call.
        values: [blocks, block_size, G, Dv].
        key_scales, value_scales: [blocks, block_size, G] bfloat16, where the cache is int8.
    """

    def __init__(self, window: int | None = None, *, of_memory: bool = False, value_width: int | None = None):
        self.table = MEMORY if of_memory else window  # its key in the tables of the KVCache
        self.value_width = value_width
        self.dtype: torch.dtype | None = None  # that of the keys
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        self._blocks = 0

    def append(self, key: Tensor, value: Tensor | None, sequences: Sequences):
        """Writes keys and values of new tokens behind those held.

        Args:
            key: [N, G, D], or [B, T, G, D] of sequences of T tokens each.
            value: [N, G, Dv], [B, T, G, Dv]; None with `value_width`.
            sequences: whose tokens they are.
        """
        table = sequences.cache.tables[self.table]
        value = key[..., :0] if value is None else value
        if self.keys is None:
            self._begin(key, value, table.pool)
        self.reserve(table.pool)
        ops.append_to_cache_(
            *(key, value, self.keys, self.values, sequences.held),
            cu_seqlens=sequences.cu_seqlens if key.ndim == 3 else None,
            block_table=table.tensor(key.device),
            key_scales=self.key_scales,
            value_scales=self.value_scales,
        )

    def attend(self, query: Tensor, sequences: Sequences, **options) -> Tensor:
        """Attention of the queries of new tokens, [N, H, D] or [B, T, H, D], to all that is held."""
        values, value_scales = self.values, self.value_scales
        if self.value_width is not None:
            values, value_scales = self.keys[..., : self.value_width], self.key_scales
        cache, starts, shape = sequences.cache, sequences.cu_seqlens, query.shape[:-2]
        if self.table == MEMORY:
            # Sequences that share a memory, as beams do, are one to it: its keys are read once for all.
            count, table, lengths = cache.memories
            starts, query, options["is_causal"] = starts[::count].contiguous(), query.flatten(0, -3), False
        else:
            table, lengths = cache.tables[self.table].tensor(query.device), sequences.totals
        out = ops.cached_attention(
            *(query, self.keys, values, lengths),
            cu_seqlens_q=starts if query.ndim == 3 else None,
            block_table=table,
            key_scales=self.key_scales,
            value_scales=value_scales,
            **options,
        )
        return out.unflatten(0, shape) if out.ndim < len(shape) + 2 else out

    def heads(self, sequences: Sequences, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` keys and values of each sequence, [B, G, length, D] and
        [B, G, length, Dv]; those of int8 as float32."""
        table = sequences.cache.tables[self.table]
        blocks = table.tensor(self.keys.device)[:, : -(-length // table.pool.block_size)]

        def gathered(t):
            t = t.index_select(0, blocks.flatten())
            return t.unflatten(0, blocks.shape).flatten(1, 2)[:, :length].transpose(1, 2)

        keys, values = gathered(self.keys), gathered(self.values)
        if self.key_scales is None:
            return keys, values
        return keys * gathered(self.key_scales)[..., None], values * gathered(self.value_scales)[..., None]

    def copy_blocks(self, old: Tensor, new: Tensor, count: int):
        """Copies the first `count` tokens of blocks old [n] to blocks new [n]."""
        for t in self._tensors():
            ops.copy_blocks_(t, old, new, count)

    def reserve(self, pool: BlockPool):
        """Has memory for all blocks of the pool."""
        if self._blocks < pool.capacity:
            self._grow(pool)

    @property
    def nbytes(self) -> int:
        """Memory of the blocks, in bytes."""
        return sum(t.nbytes for t in self._tensors())

    def _tensors(self):
        tensors = self.keys, self.values, self.key_scales, self.value_scales
        return [t for t in tensors if t is not None]

    def _begin(self, key, value, pool):
        dtype = self.dtype or key.dtype
        shape = 0, pool.block_size
        self.keys, self.values = (key.new_empty(*shape, *t.shape[-2:], dtype=dtype) for t in (key, value))
        if dtype == torch.int8:
            scales = [key.new_empty(*shape, key.shape[-2], dtype=torch.bfloat16) for _ in range(2)]
            self.key_scales, self.value_scales = scales

    def _grow(self, pool):
        for name in ("keys", "values", "key_scales", "value_scales"):
            old = getattr(self, name)
            if old is not None:
                new = empty((pool.capacity, *old.shape[1:]), old)
                new[: len(old)] = old
                setattr(self, name, new)
        self._blocks = pool.capacity


class DecoderLayerCache(NamedTuple):
    """What a layer keeps of its own tokens, and of the memory that they attend to."""

    attention: LayerCache
    cross_attention: LayerCache
