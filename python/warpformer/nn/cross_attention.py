from typing import NamedTuple

from torch import Tensor, nn

from warpformer import ops
from warpformer.nn.dropout import Dropout
from warpformer.nn.feed_forward import added
from warpformer.nn.layer_cache import LayerCache
from warpformer.nn.sequences import Sequences


class Memory(NamedTuple):
    """What a decoder attends to beside its own tokens: the hidden states of an encoder.

    Attributes:
        rows: [M, C], without padding.
        sequences: whose rows they are; with a cache, what its `hold_memory` made of them.
    """

    rows: Tensor
    sequences: Sequences


class CrossAttention(nn.Module):
    """Attention of the tokens of packed sequences to all rows of their memories.

        q = q(x)                                  H heads of width D
        k, v = kv(memory)                         G heads of width D each
        forward(x, ...) = dropout(out(concat_h(attention(q_h, k_h G/H, v_h G/H)))) + residual

    Args:
        q: Linear, [C] to [H D].
        kv: Linear, [width of the memory] to [2 G D]: the rows of all keys, of all values.
        out: Linear, [H D] to [C].
        num_heads: H.
        num_kv_heads: G, a divisor of H.
        dropout: probability of a 0 in the output, in training; `attention_dropout` of the weights.
        options: scale, softcap...: those of `ops.scaled_dot_product_attention`.

    Args of forward:
        x: [N, C], rows of `sequences`.
        sequences: whose tokens they are.
        memory: one of each sequence, [M, C]; None where `cache` holds its keys and values.
        cache: a LayerCache of memories, which keeps them for later calls.
        residual: [N, C].

    Returns:
        [N, C]. A sequence whose memory is empty gets out's bias and the residual.

    Source: "Attention Is All You Need", 3.2.3.
    """

    def __init__(
        self,
        q: nn.Module,
        kv: nn.Module,
        out: nn.Module,
        num_heads: int,
        num_kv_heads: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        **options,
    ):
        super().__init__()
        self.q = q
        self.kv = kv
        self.out = out
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.dropout = Dropout(dropout)
        self.attention_dropout = attention_dropout
        self.options = options

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Memory | None,
        cache: LayerCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1))
        if memory is not None:
            k, v = self.kv(memory.rows).unflatten(-1, (2 * self.num_kv_heads, -1)).chunk(2, 1)
        if cache is not None:
            if memory is not None:
                cache.append(k, v, memory.sequences)
            out = cache.attend(q, sequences, **self.options)
        else:
            starts = dict(cu_seqlens_q=sequences.cu_seqlens, cu_seqlens_k=memory.sequences.cu_seqlens)
            dropout = self.attention_dropout if self.training else 0.0
            options = dict(self.options, enable_gqa=True, dropout_p=dropout, **starts)
            out = ops.scaled_dot_product_attention(q, k, v, **options)
        return added(self.out, self.dropout, out.flatten(1), residual)

    def make_cache(self) -> LayerCache:
        return LayerCache(of_memory=True)

    def extra_repr(self):
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.options}"
