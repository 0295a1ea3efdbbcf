from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import NamedTuple
from weakref import finalize

import numpy as np
import torch
from torch import Tensor, nn

from warpformer._C import InputError
from warpformer.nn.block_pool import BlockPool, CacheFull
from warpformer.nn.block_table import BlockTable, Mirror, release_all
from warpformer.nn.layer_cache import MEMORY, DecoderLayerCache, LayerCache
from warpformer.nn.recorded_calls import RecordedCalls
from warpformer.nn.sequences import Sequences

BLOCK_SIZE = 32


class CacheMemory(NamedTuple):
    """Bytes of a cache: of the blocks that sequences hold, forks included, each counted once; and of all that
    is reserved."""

    held: int
    reserved: int


class Memories(NamedTuple):
    """Memories of a cache's sequences, those once that `count` sequences one after the other share.

    Attributes:
        count: sequences of each, B = count memories.
        block_table: [memories, columns], as the ops take it.
        lengths: [memories] int32.
    """

    count: int
    block_table: Tensor
    lengths: Tensor


class KVCache:
    """Keys and values of all layers of a model, of sequences of unequal lengths: `model(ids, cache=cache)`.

        cache = model.make_cache()
        for token in ...: logits = model(token, cache=cache)

    gives what model(all tokens) gives for the last of them. Padding of a call is not stored.

    Tokens lie in blocks, which sequences share: `fork`, `reorder_` and `join_` move no keys, and a sequence
    that goes on copies at most the last, partly filled block of each layer. A prompt that many requests begin
    with is computed once:

        prefix = model.make_cache()
        model(system_prompt, cache=prefix)
        cache = prefix.fork([0] * len(requests))
        model(requests, mask, cache=cache)

    Layers with a window release the blocks that it has passed; after any call the last `block_size` tokens
    can be taken back. When nobody refers to a cache any more, its blocks are free.

    Args:
        layers: of each layer of the model a LayerCache, or a DecoderLayerCache.
        dtype: torch.int8, attended to as it is, with a scale for each token and head; None: that of the keys.
            int8 takes D + 2 bytes a token and head of width D, bfloat16 2 D.
        max_tokens: of all sequences and forks together, in whole blocks. Memory for them is reserved at the
            first call; that of layers with a window, which hold fewer, and of memories grows as it is needed,
            as all of it does if None.
        block_size: tokens of a block.

    Attributes:
        layers: what a layer takes as `cache`.
        tokens: [B] int64, numpy: of each sequence; the host knows them without waiting for a device.
        longest: tokens of the longest.
        memory_tokens: [B], of the memories, where a decoder attends to any and `holds_memory`.

    Raises:
        InputError: dtype, max_tokens or block_size are not as said.
        CacheFull: (of the call of a model) there is no room for its tokens. The cache is as before.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
    (2023); Beltagy et al., "Longformer" (2020), and Jiang et al., "Mistral 7B" (2023), of windows.
    """

    def __init__(
        self,
        layers: Sequence[LayerCache | DecoderLayerCache],
        *,
        dtype: torch.dtype | None = None,
        max_tokens: int | None = None,
        block_size: int = BLOCK_SIZE,
    ):
        if dtype not in (None, torch.int8):
            raise InputError(f"a cache is in torch.int8 or in the dtype of the keys (None), not in {dtype}")
        if block_size < 1 or (max_tokens is not None and max_tokens < 1):
            raise InputError(f"max_tokens = {max_tokens} or block_size = {block_size} is not positive")
        self.layers = list(layers)
        self.block_size = block_size
        self.max_tokens = max_tokens
        self.tables: dict[int | str | None, BlockTable] = {}
        for layer in self._attentions():
            layer.dtype = dtype
            if layer.table not in self.tables:
                self.tables[layer.table] = self._new_table(layer.table)
        self.tokens = self.memory_tokens = np.zeros(0, np.int64)
        self.holds_memory = False
        self._device = torch.device("cpu")
        self._memories: Memories | None = None
        self._begin()

    def _new_table(self, key):
        if key == MEMORY:
            return BlockTable(BlockPool(self.block_size))
        blocks = None if self.max_tokens is None else -(-self.max_tokens // self.block_size)
        pool = BlockPool(self.block_size, blocks)
        if key is None and blocks is not None:
            pool.reserve(blocks)
        return BlockTable(pool, key)

    def _begin(self):
        self._recorded: RecordedCalls | None = None
        self._mirrors = Mirror(), Mirror()  # of the memories' tables and lengths
        self._changed()
        finalize(self, release_all, [*self.tables.values()]).atexit = False

    # What is held

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """[B] int32: tokens of each sequence."""
        if self._lengths is None:
            self._lengths = torch.from_numpy(self.tokens.astype(np.int32)).to(self._device)
        return self._lengths

    @property
    def next_longest(self) -> int:
        """Tokens of the longest with those of the call that has begun."""
        return int(self._totals.max(initial=0))

    @property
    def memories(self) -> Memories:
        """What a decoder attends to beside its own tokens."""
        if not self._memories_are_current:
            table = self.tables[MEMORY]
            count = table.sharing()
            values = table.entries[::count], self.memory_tokens[::count]
            shown = (
                mirror.show(new, self._device) for mirror, new in zip(self._mirrors, values, strict=True)
            )
            self._memories = Memories(count, *shown)
            self._memories_are_current = True
        return self._memories

    @property
    def free_tokens(self) -> int | None:
        """Free blocks have room for so many; None: for any number."""
        left = [table.pool.left for table in self.tables.values()]
        return min((n * self.block_size for n in left if n is not None), default=None)

    def memory(self) -> CacheMemory:
        """What this cache and all its forks take."""
        held = reserved = 0
        for layer in self._attentions():
            pool = self.tables[layer.table].pool
            reserved += layer.nbytes
            held += layer.nbytes // pool.capacity * pool.used
        return CacheMemory(held, reserved)

    # Sequences come and go

    def add_(self, count: int):
        """So many sequences without tokens follow."""
        for table in self.tables.values():
            table.extend_(BlockTable(table.pool, entries=np.zeros((count, 0), np.int32)))
        none = np.zeros(count, np.int64)
        self.tokens, self.memory_tokens = np.append(self.tokens, none), np.append(self.memory_tokens, none)
        self._changed()

    def fork(self, index: Tensor | Sequence[int] | None = None) -> "KVCache":
        """Another cache, of sequences index[b] of this one (None: all), which share what they hold. Both go
        on as they like."""
        index = np.arange(len(self)) if index is None else self._checked(index)
        fork = copy(self)
        fork.tables = {key: table.selected(index) for key, table in self.tables.items()}
        fork.tokens, fork.memory_tokens = self.tokens[index], self.memory_tokens[index]
        fork._begin()
        self._room = 0
        return fork

    def reorder_(self, index: Tensor | Sequence[int]):
        """Sequence b becomes what sequence index[b] was; there may be more or fewer than before, or none."""
        index = self._checked(index)
        for table in self.tables.values():
            table.select_(index)
        self.tokens, self.memory_tokens = self.tokens[index], self.memory_tokens[index]
        self._changed()

    def join_(self, other: "KVCache"):
        """The sequences of `other` follow, which keeps its own: they share what they hold.

        Raises:
            InputError: neither of the two is a fork of the other, or of the same.
        """
        if self.layers is not other.layers:
            raise InputError("only forks of one cache can join: their blocks are others")
        for key, table in self.tables.items():
            table.extend_(other.tables[key])
        self.tokens = np.append(self.tokens, other.tokens)
        self.memory_tokens = np.append(self.memory_tokens, other.memory_tokens)
        self.holds_memory = self.holds_memory or other.holds_memory
        self._changed()
        other._room = 0

    def rewind_(self, counts: int | Tensor | Sequence[int]):
        """Takes back the last counts[b] tokens of each sequence, as speculative decoding does.

        Raises:
            InputError: a sequence has fewer, there are not so many sequences, or a window has released what
                the next token would see.
        """
        counts = np.asarray(counts, np.int64)
        fits = counts.shape in ((), self.tokens.shape) and counts.min(initial=0) >= 0
        lengths = self.tokens - counts if fits else None
        if not fits or lengths.min(initial=0) < 0:
            raise InputError(f"{counts.tolist()} tokens cannot be taken from {self.tokens.tolist()}")
        tables = [table for key, table in self.tables.items() if key != MEMORY]
        for table in tables:
            table.check_rewind(lengths)
        room = 0
        if ((lengths - 1) // self.block_size < (self.tokens - 1) // self.block_size).any():
            for table in tables:
                table.rewind_(lengths)
        elif len(self) and self._room:  # sequences go on in blocks of their own
            room = self._room + int(counts.min())
        self.tokens = lengths
        self._changed()
        self._room = room

    # A call of the model

    def begin(self, counts: int | np.ndarray, batch: int, device):
        """Has room for counts[b] new tokens of each of `batch` sequences; a cache without any begins with so
        many.

        Raises:
            CacheFull: see above.
            InputError: there are not so many sequences, or a gradient is asked for.
        """
        if torch.is_grad_enabled():
            raise InputError("a cache is for inference: call the model under torch.no_grad()")
        self._device = device
        begins = not len(self)
        if begins:
            self.holds_memory = False
            self.add_(batch)
        if len(self) != batch:
            raise InputError(f"the cache holds {len(self)} sequences, and the batch has {batch}")
        self._totals = self.tokens + counts
        self._is_even = isinstance(counts, int)
        self._most = counts if self._is_even else int(counts.max(initial=0))
        try:
            if batch and self._most > self._room:
                self._make_room()
        except CacheFull:
            if begins:
                self.reorder_([])
            raise

    def reserve_(self, tokens: int):
        """Has memory for so many tokens of all sequences together from the next call on, rather than more and
        more. Layers with a window, which hold fewer, and memories are left as they are."""
        table, blocks = self.tables.get(None), -(-tokens // self.block_size)
        if table is not None and table.pool.capacity <= blocks:
            table.pool.reserve(blocks)

    def record_(self):
        """From now on calls of the model that repeat themselves are recorded, as RecordedCalls has it."""
        self._recorded = RecordedCalls()

    def again(self, tokens: Tensor | None, *state) -> Tensor | None:
        """What a call of `record` with the same `state` would return of tokens [B, T], all of which count,
        and which the cache then holds; None if there is no recording of it."""
        if self._recorded is None or tokens is None or tokens.ndim != 2 or not self.longest:
            return None
        batch, count = tokens.shape
        if len(self) != batch:
            return None  # as the call itself tells
        if count > self._room or torch.is_grad_enabled():
            self.begin(count, batch, tokens.device)
        longest = self.longest + count
        out = self._recorded.again(tokens, self.tokens, longest, state, self._memory())
        if out is not None:
            self._advance(self.tokens + count, count, longest)
        return out

    def record(
        self,
        model: nn.Module,
        function: Callable[[Tensor, Sequences], Tensor],
        tokens: Tensor,
        sequences: Sequences,
        limit: int | None,
        *state,
    ) -> Tensor:
        """function(tokens without padding, sequences), of a model all whose layers append to this cache.
        After `record_` it is recorded where it repeats itself.

        Args:
            limit: tokens of a sequence up to which the model stays as it is; None: always.
            state: what tells one function from another.
        """
        is_step = tokens.ndim == 2 and sequences.kept is None and not sequences.is_first
        if self._recorded is None or not is_step:
            return function(sequences.pack(tokens), sequences)
        for layer in self._attentions():
            layer.reserve(self.tables[layer.table].pool)
        return self._recorded.record(model, function, tokens, sequences, limit, state, self._memory())

    def _memory(self):
        """Where the layers read and write, with the values of now."""
        count = self.memories.count if self.holds_memory else None
        tables = [*self.tables.values()]
        for table in tables:
            table.tensor(self._device)
        places = [(table.mirror.moves, table.pool.capacity) for table in tables]
        return count, *places, *(mirror.moves for mirror in self._mirrors)

    def advance(self):
        """Counts the tokens that all layers have appended."""
        longest = self.longest + self._most if self._is_even else self.next_longest
        self._advance(self._totals, self._most, longest)
        self.holds_memory = MEMORY in self.tables

    def _advance(self, tokens, most, longest):
        self.tokens, self.longest, self._lengths = tokens, longest, None
        self._room -= most

    def hold_memory(self, sequences: Sequences) -> Sequences:
        """Has room for the memories of the sequences; returns theirs, as LayerCache.append takes them."""
        table, none = self.tables[MEMORY], np.zeros(len(self), np.int64)
        self.memory_tokens = sequences.cu_seqlens.diff().cpu().numpy().astype(np.int64)
        table.fill(table.need(none, self.memory_tokens, False))
        self._memories_are_current = False
        totals = torch.from_numpy(self.memory_tokens.astype(np.int32)).to(self._device)
        return replace(sequences, cache=self, held=torch.zeros_like(totals), totals=totals)

    def _make_room(self):
        tables = [(key, table) for key, table in self.tables.items() if key != MEMORY]
        needs = []
        for _, table in tables:
            table.pass_by(self.tokens)
            needs.append(table.need(self.tokens, self._totals, not self.longest))
        for (_, table), need in zip(tables, needs, strict=True):
            left = table.pool.left
            if left is not None and len(need) > left:
                raise CacheFull(
                    f"the cache has room for max_tokens = {self.max_tokens}: {len(need)} more blocks of "
                    f"{self.block_size} tokens are needed, and {left} are free"
                )
        for (key, table), need in zip(tables, needs, strict=True):
            if copies := table.fill(need):
                self._copy_blocks(key, table.pool, copies)
        # Where a sequence gets no token, its last block may be another's, too.
        writes = self._most > 0 and (self._is_even or bool((self._totals > self.tokens).all()))
        room = self._totals - self.tokens + -self._totals % self.block_size
        self._room = int(room.min()) if writes else 0

    def _copy_blocks(self, key, pool, copies):
        old, new = torch.from_numpy(np.array(copies).T.copy()).to(self._device)
        count = int((self.tokens % self.block_size).max())  # of tokens in a last block
        for layer in self._attentions():
            if layer.table == key and layer.keys is not None:
                layer.reserve(pool)
                layer.copy_blocks(old, new, count)

    def _attentions(self) -> Iterator[LayerCache]:
        for layer in self.layers:
            yield from layer if isinstance(layer, DecoderLayerCache) else (layer,)

    def _checked(self, index) -> np.ndarray:
        index = np.asarray(index.cpu() if isinstance(index, Tensor) else index, np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise InputError(f"index = {index.tolist()} is not of {len(self)} sequences")
        return index

    def _changed(self):
        self._room = 0  # tokens of each sequence that need no other blocks
        self._lengths = None
        self._memories_are_current = False
        self.longest = int(self.tokens.max(initial=0))
