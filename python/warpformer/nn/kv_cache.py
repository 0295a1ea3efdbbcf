import torch
from torch import Tensor

from warpformer._C import InputError

CAPACITY = 64  # tokens, at first


class KVCache:
    """Keys and values of one attention layer, kept from call to call.

    Args:
        growing: whether every call appends those of new tokens, as in decoding; if not, the first call's are
            all there is, and later calls do not look at `key` and `value`: those of an encoder's memory.

    Attributes:
        length: tokens held.
        keys: [B, capacity, H, D] with `length` slots in use; None before the first call.
        values: as keys.
    """

    def __init__(self, growing: bool = True):
        self.growing = growing
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def is_full(self) -> bool:
        return self.length > 0 and not self.growing

    def append(self, keys: Tensor, values: Tensor):
        """Adds keys and values [B, H, T, D] of T tokens.

        Raises:
            InputError: the batch is another than before, or a gradient is asked for.
        """
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise InputError("a KVCache is for inference: call the layer under torch.no_grad()")
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        end = self.length + keys.shape[1]
        if self.keys is not None and self.keys.shape[0] != keys.shape[0]:
            raise InputError(
                f"the KVCache holds {self.keys.shape[0]} sequences, and keys = {list(keys.shape)} are those "
                f"of {keys.shape[0]}"
            )
        self.keys, self.values = (
            self._with_room(self.keys, keys, end),
            self._with_room(self.values, values, end),
        )
        self.keys[:, self.length : end] = keys
        self.values[:, self.length : end] = values
        self.length = end

    def _with_room(self, buffer, new, tokens):
        if buffer is not None and tokens <= buffer.shape[1]:
            return buffer
        capacity = max(CAPACITY, 2 * buffer.shape[1] if buffer is not None else 0, tokens)
        grown = new.new_empty(new.shape[0], capacity if self.growing else tokens, *new.shape[2:])
        if buffer is not None:
            grown[:, : self.length] = buffer[:, : self.length]
        return grown

    def heads(self) -> tuple[Tensor, Tensor]:
        """The keys and values held, [B, H, length, D]."""
        return tuple(t[:, : self.length].transpose(1, 2) for t in (self.keys, self.values))

    def lengths(self) -> Tensor:
        """[B] int32, as `warpformer.ops.cached_attention` takes it."""
        return torch.full((len(self.keys),), self.length, dtype=torch.int32, device=self.keys.device)

    def reorder_(self, index: Tensor):
        """Sequence b becomes what sequence index[b] was, as beam search needs it."""
        if self.keys is not None:
            self.keys, self.values = (t.index_select(0, index) for t in (self.keys, self.values))


class DecoderLayerCache:
    """Caches of a TransformerDecoderLayer: of its own tokens, and of the memory."""

    def __init__(self):
        self.tokens = KVCache()
        self.memory = KVCache(growing=False)


class DecoderCache:
    """Keys and values of all layers of a TransformerDecoder, for decoding token by token.

        cache = DecoderCache()
        for token in ...: out = decoder(token, memory, cache=cache)

    gives what decoder(all tokens, memory, tgt_is_causal=True, tgt_mask=the causal one) gives for the last of
    them. One cache serves one batch of sequences and its memory.

    Attributes:
        length: tokens decoded so far.
        layers: a DecoderLayerCache for each layer, from the first call on.
    """

    def __init__(self):
        self.layers: list[DecoderLayerCache] = []

    @property
    def length(self) -> int:
        return self.layers[0].tokens.length if self.layers else 0

    def of_layers(self, count: int) -> list[DecoderLayerCache]:
        """The caches of `count` layers, made at the first call.

        Raises:
            InputError: it has served a decoder with another number of layers.
        """
        if not self.layers:
            self.layers = [DecoderLayerCache() for _ in range(count)]
        if len(self.layers) != count:
            raise InputError(f"the DecoderCache is that of {len(self.layers)} layers, not {count}")
        return self.layers

    def reorder_(self, index: Tensor):
        """Sequence b becomes what sequence index[b] was, as beam search needs it."""
        for layer in self.layers:
            layer.tokens.reorder_(index)
            layer.memory.reorder_(index)
