"""Weights in fewer bits: the formats, and whole models in them."""

from warpformer.ops._quantized import dequantize
from warpformer.quantization.mxfp4 import dequantize_mxfp4
from warpformer.quantization.quantize import quantize
from warpformer.quantization.quantize_ import LayerReport, quantize_

__all__ = ["LayerReport", "dequantize", "dequantize_mxfp4", "quantize", "quantize_"]
