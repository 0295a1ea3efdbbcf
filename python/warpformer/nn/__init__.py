"""Layers with the constructors and state_dicts of torch.nn, on the kernels of warpformer.ops."""

from warpformer.nn._repack import repack_
from warpformer.nn.layer_norm import LayerNorm
from warpformer.nn.linear import Linear
from warpformer.nn.packed_linear import PackedLinear
from warpformer.nn.quantized_linear import Int4Linear, Int8Linear
from warpformer.nn.rms_norm import RMSNorm

__all__ = ["Int4Linear", "Int8Linear", "LayerNorm", "Linear", "PackedLinear", "RMSNorm", "repack_"]
