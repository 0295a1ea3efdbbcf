"""GGUF files as llama.cpp writes them, through its own package."""

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

LLAMA = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e5,
}


def write(path, tensors, architecture="llama", fields=LLAMA, others=()):
    """`tensors`: name -> array, or (bytes of its rows, type). Returns `path`."""
    writer = GGUFWriter(path, architecture)
    for key, value in [*((f"{architecture}.{key}", value) for key, value in fields.items()), *others]:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name, value in tensors.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(shape, kind: GGMLQuantizationType):
    """Random rows of a type."""
    width, size = GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(0)
    try:
        return quantize(generator.standard_normal(shape, np.float32), kind), kind
    except NotImplementedError:  # of these, any bytes are a number, but for scales that are not finite
        rows = generator.integers(0, 256, (*shape[:-1], shape[-1] // width * size), np.uint8)
        return rows & 0xBF, kind
