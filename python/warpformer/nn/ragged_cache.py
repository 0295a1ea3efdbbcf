import torch
from torch import Tensor

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn.sequences import Sequences

CAPACITY = 64  # tokens, at first


class RaggedLayerCache:
    """Keys and values of one attention layer, of sequences of unequal lengths.

    Attributes:
        keys: [B, capacity, G, D], of sequence b the first `lengths[b]` slots of the RaggedCache in use; None
            before the first call.
        values: [B, capacity, G, Dv].
    """

    def __init__(self):
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor, sequences: Sequences):
        """Writes key [N, G, D] and value [N, G, Dv] of new tokens behind those held."""
        self.keys = _with_room(self.keys, key, sequences)
        self.values = _with_room(self.values, value, sequences)
        caches = self.keys, self.values
        ops.append_to_cache_(key, value, *caches, sequences.held, cu_seqlens=sequences.cu_seqlens)

    def attend(self, query: Tensor, sequences: Sequences, **options) -> Tensor:
        """Attention of the queries [N, H, D] of new tokens to all that is held, [N, H, Dv]."""
        caches, starts = (self.keys, self.values), sequences.cu_seqlens
        return ops.cached_attention(query, *caches, sequences.totals, cu_seqlens_q=starts, **options)

    def reorder_(self, index: Tensor, slots: int):
        """Sequence b becomes what sequence index[b] was, in its first `slots` slots."""
        if self.keys is not None:
            self.keys, self.values = (_reordered(t, index, slots) for t in (self.keys, self.values))


class RaggedCache:
    """Keys and values of all layers of a model, of sequences of unequal lengths: `model(ids, cache=cache)`.

        cache = model.make_cache()
        for token in ...: logits = model(token, cache=cache)

    gives what model(all tokens) gives for the last of them. Padding of a call is not stored. One cache serves
    one batch of sequences.

    Args:
        layers: the cache of each layer.

    Attributes:
        lengths: [B] int32, tokens of each sequence; None before the first call.
        longest: no sequence has more; the host knows it without waiting for a device.
    """

    def __init__(self, layers: list):
        self.layers = layers
        self.lengths: Tensor | None = None
        self.longest = 0

    def held(self, batch: int, device) -> Tensor:
        """`lengths`, for a call of the model with so many sequences.

        Raises:
            InputError: the batch is another than before, or a gradient is asked for.
        """
        if torch.is_grad_enabled():
            raise InputError("a cache is for inference: call the model under torch.no_grad()")
        if self.lengths is None:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        if len(self.lengths) != batch:
            raise InputError(f"the cache holds {len(self.lengths)} sequences, and the batch has {batch}")
        return self.lengths

    def advance(self, sequences: Sequences):
        """Counts the tokens that all layers have appended."""
        self.lengths = sequences.totals
        self.longest += sequences.shape[1]

    def reorder_(self, index: Tensor):
        """Sequence b becomes what sequence index[b] was, as beam search needs it; there may be more or fewer
        than before."""
        if self.lengths is not None:
            self.lengths = self.lengths[index]
        for layer in self.layers:
            layer.reorder_(index, self.longest)


def _with_room(buffer, new, sequences):
    """`buffer`, or a longer one where it has not the slots for all tokens."""
    tokens = sequences.longest
    if buffer is not None and tokens <= buffer.shape[1]:
        return buffer
    capacity = max(CAPACITY, tokens, 0 if buffer is None else 2 * buffer.shape[1])
    grown = new.new_empty(sequences.shape[0], capacity, *new.shape[1:])
    if buffer is not None:
        grown[:, : buffer.shape[1]] = buffer
    return grown


def _reordered(buffer, index, slots):
    """buffer[index], of which only the first slots are copied."""
    out = buffer.new_empty(len(index), *buffer.shape[1:])
    torch.index_select(buffer[:, :slots], 0, index, out=out[:, :slots])
    return out
