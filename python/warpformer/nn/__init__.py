"""Layers with the constructors and state_dicts of torch.nn, on the kernels of warpformer.ops."""

from warpformer.nn.layer_norm import LayerNorm
from warpformer.nn.linear import Linear
from warpformer.nn.rms_norm import RMSNorm

__all__ = ["LayerNorm", "Linear", "RMSNorm"]
