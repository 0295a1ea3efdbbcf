"""BERT: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2019).

Shapes: B batch, T tokens of the longest sequence, N tokens of all sequences together, C = hidden_size,
H = num_attention_heads, D = C / H. Inside, the sequences lie packed one after the other, [N, C]: padding
is never computed.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.models._config import require
from warpformer.nn import LayerNorm, PackedLinear

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"
    is_decoder: bool = False

    def __post_init__(self):
        require(self.num_hidden_layers <= 1024, f"num_hidden_layers = {self.num_hidden_layers} is over 1024")
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size = {self.hidden_size} is no multiple of num_attention_heads = "
            f"{self.num_attention_heads}",
        )
        require(
            self.hidden_act in ACTIVATIONS, f"hidden_act = {self.hidden_act!r} is none of {[*ACTIVATIONS]}"
        )
        require(self.layer_norm_eps >= 0, f"layer_norm_eps = {self.layer_norm_eps} is negative")
        require(
            self.position_embedding_type == "absolute",
            f"position_embedding_type = {self.position_embedding_type!r} is not 'absolute'",
        )
        require(not self.is_decoder, "is_decoder = true: this is the encoder")


class Output(NamedTuple):
    last_hidden_state: Tensor  # [B, T, C], 0 where attention_mask is
    pooler_output: Tensor | None  # [B, C]; None for a checkpoint without pooler


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.activation = ACTIVATIONS[config.hidden_act]
        self.qkv = PackedLinear(width, 3 * width, parts=("query", "key", "value"))
        self.attention_out = PackedLinear(width, width)
        self.attention_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.up = PackedLinear(width, config.intermediate_size)
        self.down = PackedLinear(config.intermediate_size, width)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [N, H, D] each
        seen = ops.scaled_dot_product_attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        x = self.attention_norm(self.attention_out(seen.flatten(1), residual=x))
        return self.norm(self.down(self.up(x, activation=self.activation), residual=x))


class Model(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.token_types = nn.Embedding(config.type_vocab_size, width)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.pooler = PackedLinear(width, width)

    def drop_missing(self, keys: set[str]):
        """Drops the pooler where the checkpoint (`keys`: its tensors' names here) has none."""
        if not any(key.startswith("pooler.") for key in keys):
            self.pooler = None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Output:
        """Hidden states of a padded batch.

        Args:
            input_ids: [B, T] int64 or int32.
            attention_mask: [B, T], nonzero = a token, 0 = padding, anywhere in the row; all tokens if None.
            token_type_ids: [B, T]; 0 if None.
            position_ids: [B, T] or [1, T]; 0, 1, ... if None.

        Raises:
            InputError: an id is outside its table, a shape does not fit.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        kept = attention_mask != 0  # [B, T]
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = position_ids.expand_as(input_ids)[kept]
        cu_seqlens = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        packed = self.forward_packed(input_ids[kept], cu_seqlens, positions, token_type_ids[kept])
        hidden = packed.new_zeros(*input_ids.shape, packed.shape[-1])
        hidden[kept] = packed
        pooled = self.pooler(hidden[:, 0], activation="tanh") if self.pooler is not None else None
        return Output(hidden, pooled)

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, C] of packed sequences.

        Args:
            input_ids, position_ids, token_type_ids: [N] int64 or int32, the sequences one after the other.
            cu_seqlens: [sequences + 1] int32, where each begins, and N.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        tables = [self.tokens.weight, self.positions.weight, self.token_types.weight]
        x = self.norm(ops.embedding_sum([input_ids, position_ids, token_type_ids], tables))
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return x


RENAMES = [
    (r"^bert\.", ""),
    (r"^embeddings\.word_embeddings\.", "tokens."),
    (r"^embeddings\.position_embeddings\.", "positions."),
    (r"^embeddings\.token_type_embeddings\.", "token_types."),
    (r"^embeddings\.LayerNorm\.", "norm."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.self\.", ".qkv."),
    (r"\.attention\.output\.dense\.", ".attention_out."),
    (r"\.attention\.output\.LayerNorm\.", ".attention_norm."),
    (r"\.intermediate\.dense\.", ".up."),
    (r"\.output\.dense\.", ".down."),
    (r"\.output\.LayerNorm\.", ".norm."),
    (r"^pooler\.dense\.", "pooler."),
    (r"\bgamma$", "weight"),  # the names of the first TensorFlow checkpoints
    (r"\bbeta$", "bias"),
]


ORIGINALS = [
    (r"^tokens\.", "embeddings.word_embeddings."),
    (r"^positions\.", "embeddings.position_embeddings."),
    (r"^token_types\.", "embeddings.token_type_embeddings."),
    (r"^norm\.", "embeddings.LayerNorm."),
    (r"^layers\.", "encoder.layer."),
    (r"\.qkv\.", ".attention.self."),
    (r"\.attention_out\.", ".attention.output.dense."),
    (r"\.attention_norm\.", ".attention.output.LayerNorm."),
    (r"\.up\.", ".intermediate.dense."),
    (r"\.down\.", ".output.dense."),
    (r"\.norm\.", ".output.LayerNorm."),
    (r"^pooler\.", "pooler.dense."),
]


def rename(key: str) -> str | None:
    if key.startswith("cls.") or key.endswith("position_ids"):
        return None
    return _replace(key, RENAMES)


def original(name: str) -> str:
    return _replace(name, ORIGINALS)


def _replace(name, pairs):
    for pattern, other in pairs:
        name = re.sub(pattern, other, name)
    return name
