"""How the layers of torch.nn, which take batches, call a KVCache, which takes packed sequences."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from warpformer.nn._attention_inputs import as_batch, require
from warpformer.nn.kv_cache import KVCache
from warpformer.nn.layer_cache import MEMORY, DecoderLayerCache, LayerCache
from warpformer.nn.sequences import Sequences


class CachedLayer(NamedTuple):
    """What an attention layer of torch.nn takes in the midst of a call.

    Attributes:
        layer: its cache.
        sequences: of the tokens of the call.
        length: keys that the queries of each sequence attend to.
        new_memory: those of a memory that is yet to be held.
    """

    layer: LayerCache
    sequences: Sequences
    length: int
    new_memory: Sequences | None

    @property
    def of_memory(self) -> bool:
        return self.layer.table == MEMORY

    def append(self, key: Tensor, value: Tensor):
        """Keys and values [B, H, T, D]."""
        sequences = self.new_memory if self.of_memory else self.sequences
        self.layer.append(key.transpose(1, 2), value.transpose(1, 2), sequences)

    def attend(self, query: Tensor) -> Tensor:
        """[B, H, T, D] of queries [B, H, T, D]."""
        return self.layer.attend(query.transpose(1, 2), self.sequences).transpose(1, 2)

    def heads(self) -> tuple[Tensor, Tensor]:
        """Copies of all keys and values, [B, H, S, D]."""
        return self.layer.heads(self.sequences, self.length)


@contextmanager
def cached_call(cache: KVCache, tokens: Tensor, memory: Tensor, batch_first: bool) -> Iterator[list]:
    """A call of layers with new tokens and a memory, each [B, T, C], [T, B, C] or [T, C]: what each takes.

    Raises:
        ArgumentError: the sequences or the memories are not of one length, of which masks are.
    """
    sequences, new_memory = Sequences.of_batch(as_batch(tokens, batch_first), cache=cache), None
    if MEMORY in cache.tables and not cache.holds_memory:
        new_memory = cache.hold_memory(Sequences.of_batch(as_batch(memory, batch_first)))
    length = _common(cache.tokens) + sequences.shape[1]
    rows = _common(cache.memory_tokens)

    def cached(layer):
        if isinstance(layer, DecoderLayerCache):
            return DecoderLayerCache(*map(cached, layer))
        return CachedLayer(layer, sequences, rows if layer.table == MEMORY else length, new_memory)

    yield [cached(layer) for layer in cache.layers]
    cache.advance()


def _common(tokens):
    first = int(tokens[0]) if len(tokens) else 0
    require((tokens == first).all(), f"torch.nn's layers take sequences of one length, not {tokens.tolist()}")
    return first
