"""Weights in fewer bits: the formats, and whole models in them."""

from warpformer.ops._quantized import dequantize
from warpformer.quantization.quantize import quantize
from warpformer.quantization.quantize_ import LayerReport, quantize_

__all__ = ["LayerReport", "dequantize", "quantize", "quantize_"]
