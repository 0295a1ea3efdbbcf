"""Layers with the constructors and state_dicts of torch.nn, on the kernels of warpformer.ops."""

from warpformer.nn._repack import repack_
from warpformer.nn.block_pool import CacheFull
from warpformer.nn.blocks import (
    PostNormCrossLayer,
    PostNormLayer,
    PreNormCrossLayer,
    PreNormLayer,
    SandwichNormLayer,
)
from warpformer.nn.cross_attention import CrossAttention, Memory
from warpformer.nn.dropout import Dropout
from warpformer.nn.embedding import Embedding, SinusoidalPositions, sinusoidal_positions
from warpformer.nn.feed_forward import FeedForward
from warpformer.nn.fused_linear import FusedLinear
from warpformer.nn.grouped_linear import GroupedLinear, PackedGroupedLinear, QuantizedGroupedLinear
from warpformer.nn.kv_cache import CacheMemory, KVCache
from warpformer.nn.latent_attention import LatentAttention
from warpformer.nn.layer_cache import DecoderLayerCache, LayerCache
from warpformer.nn.layer_norm import LayerNorm, OffsetLayerNorm
from warpformer.nn.linear import Linear
from warpformer.nn.lora_linear import LoRALinear
from warpformer.nn.mixture_of_experts import ClampedSwiGLU, Experts, MixtureOfExperts
from warpformer.nn.multihead_attention import MultiheadAttention
from warpformer.nn.packed_embedding import PackedEmbedding
from warpformer.nn.packed_linear import PackedLinear
from warpformer.nn.quantized_linear import Int4Linear, Int8Linear
from warpformer.nn.rms_norm import OffsetRMSNorm, RMSNorm
from warpformer.nn.rotary_embedding import RotaryEmbedding
from warpformer.nn.router import (
    GroupLimitedTopK,
    Router,
    Routing,
    SoftmaxTopK,
    TopKSoftmax,
    load_balancing_loss,
    router_z_loss,
)
from warpformer.nn.self_attention import SelfAttention
from warpformer.nn.sequences import Sequences
from warpformer.nn.transformer import Transformer
from warpformer.nn.transformer_decoder import TransformerDecoder, TransformerDecoderLayer
from warpformer.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

__all__ = [
    "CacheFull",
    "CacheMemory",
    "ClampedSwiGLU",
    "CrossAttention",
    "DecoderLayerCache",
    "Dropout",
    "Embedding",
    "Experts",
    "FeedForward",
    "FusedLinear",
    "GroupLimitedTopK",
    "GroupedLinear",
    "Int4Linear",
    "Int8Linear",
    "KVCache",
    "LatentAttention",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "LoRALinear",
    "Memory",
    "MixtureOfExperts",
    "MultiheadAttention",
    "OffsetLayerNorm",
    "OffsetRMSNorm",
    "PackedEmbedding",
    "PackedGroupedLinear",
    "PackedLinear",
    "PostNormCrossLayer",
    "PostNormLayer",
    "PreNormCrossLayer",
    "PreNormLayer",
    "QuantizedGroupedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "Routing",
    "SandwichNormLayer",
    "SelfAttention",
    "Sequences",
    "SinusoidalPositions",
    "SoftmaxTopK",
    "TopKSoftmax",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "load_balancing_loss",
    "repack_",
    "router_z_loss",
    "sinusoidal_positions",
]
