"""Functional ops: one kernel call each. The docstrings are the contract."""

from warpformer.ops.cross_entropy import cross_entropy
from warpformer.ops.embedding_sum import embedding, embedding_sum
from warpformer.ops.gelu import gelu
from warpformer.ops.layer_norm import layer_norm
from warpformer.ops.linear import linear, pack_linear, unpack_linear
from warpformer.ops.log_softmax import log_softmax
from warpformer.ops.rms_norm import rms_norm
from warpformer.ops.scaled_dot_product_attention import scaled_dot_product_attention
from warpformer.ops.softmax import softmax

__all__ = [
    "cross_entropy",
    "embedding",
    "embedding_sum",
    "gelu",
    "layer_norm",
    "linear",
    "log_softmax",
    "pack_linear",
    "rms_norm",
    "scaled_dot_product_attention",
    "softmax",
    "unpack_linear",
]
