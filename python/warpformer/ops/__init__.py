"""Functional ops: one kernel call each. The docstrings are the contract."""

from warpformer.ops._flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from warpformer.ops._rope_frequencies import rope_frequencies, rope_tables
from warpformer.ops.activation import activation, gelu, relu, silu
from warpformer.ops.append_to_cache_ import append_to_cache_
from warpformer.ops.cached_attention import cached_attention
from warpformer.ops.copy_blocks_ import copy_blocks_
from warpformer.ops.cross_entropy import cross_entropy
from warpformer.ops.dropout import dropout
from warpformer.ops.embedding_sum import embedding, embedding_sum
from warpformer.ops.grouped_linear import grouped_linear
from warpformer.ops.layer_norm import layer_norm
from warpformer.ops.linear import PackedWeight, QuantizedWeight, linear, pack_linear, unpack_linear
from warpformer.ops.log_softmax import log_softmax
from warpformer.ops.rms_norm import rms_norm
from warpformer.ops.rope import rope
from warpformer.ops.sample import penalize, sample
from warpformer.ops.scaled_dot_product_attention import scaled_dot_product_attention
from warpformer.ops.softmax import softmax
from warpformer.ops.sort_by_expert import sort_by_expert, spread_rows, sum_rows
from warpformer.ops.top_k import top_k

__all__ = [
    "PackedWeight",
    "QuantizedWeight",
    "activation",
    "append_to_cache_",
    "cached_attention",
    "copy_blocks_",
    "cross_entropy",
    "dropout",
    "embedding",
    "embedding_sum",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "gelu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "log_softmax",
    "pack_linear",
    "penalize",
    "relu",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_tables",
    "sample",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "sort_by_expert",
    "spread_rows",
    "sum_rows",
    "top_k",
    "unpack_linear",
]
