"""The header of a GGUF file, version 2 or 3: what it says of itself and of its tensors.

    "GGUF"  version u32  tensors u64  pairs u64
    pairs:    key, type u32, value                  a string is its length u64 and UTF-8
    tensors:  name, dimensions u32, sizes u64 each (innermost first), type u32, offset u64
    padding up to a multiple of `general.alignment`, from where the offsets count

`gguf.GGUFReader` reads them, too; but it trusts them, its arrays go on past the end of the file, and it keeps
numpy objects of every token and merge: 6 seconds and 590 MB for a vocabulary of 150000, here 0.2 and 35.
"""

import math
import struct
from typing import NamedTuple

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from warpformer.models._config import CheckpointError

VERSIONS = (2, 3)
LARGEST = 1 << 27  # bytes of a header; a vocabulary of 256000 words takes 10 MB
DIMENSIONS = 4
TENSORS = 1 << 18  # of a file; those of an expert count one by one
SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


class TensorInfo(NamedTuple):
    """Where a tensor lies in the file; [N, K] has the shape (N, K)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    begin: int
    end: int


def read_header(data) -> tuple[dict, list[TensorInfo]]:
    """The metadata and the tensors of a file, of which `data` are the bytes.

    Raises:
        CheckpointError: it is damaged, cut off, or of another version. Its arrays take at most some ten times
            the memory that they have in the file.
    """
    header = _Header(data)
    if header.take(4) != b"GGUF":
        raise CheckpointError("it does not begin with GGUF")
    version = header.number("<I")
    if version not in VERSIONS:
        order = " (bytes are in the order of other machines)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(f"version {version}{order} is none of {VERSIONS}")
    tensors, pairs = header.number("<Q"), header.number("<Q")
    if tensors > TENSORS:
        raise CheckpointError(f"it has {tensors} tensors")
    metadata = {}
    for _ in range(pairs):
        key = header.string()
        if key in metadata:
            raise CheckpointError(f"it has {key!r:.80} twice")
        metadata[key] = header.value(_enum(GGUFValueType, header.number("<I"), key), key)
    infos = [_tensor(header) for _ in range(tensors)]
    return metadata, _place(infos, header.at, len(data), metadata)


class _Header:
    """Bytes that are read one after the other."""

    def __init__(self, data):
        self.data = memoryview(data)[:LARGEST]
        self.at = 0

    def take(self, count):
        if count > len(self.data) - self.at:
            raise CheckpointError(f"it is cut off: its header goes on after {len(self.data)} bytes")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self):
        try:
            return str(self.take(self.number("<Q")), "utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"a string of its header is not UTF-8: {error}") from error

    def value(self, kind, key):
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            return self.scalars(kind, 1)[0]
        kind, count = _enum(GGUFValueType, self.number("<I"), key), self.number("<Q")
        if kind == GGUFValueType.STRING:
            return [self.string() for _ in range(count)]
        if kind == GGUFValueType.ARRAY:
            raise CheckpointError(f"{key!r:.80} is an array of arrays")
        return self.scalars(kind, count)

    def scalars(self, kind, count):
        dtype = np.dtype(SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == GGUFValueType.FLOAT32:  # 1e-5, where float() has 9.999999747378752e-06
            return [float(str(value)) for value in values]
        return values.tolist()


def _enum(cls, value, name):
    try:
        return cls(value)
    except ValueError:
        raise CheckpointError(f"{name!r:.80} is of the unknown type {value}") from None


def _tensor(header):
    """Its place is still counted from the end of the header."""
    name = header.string()
    count = header.number("<I")
    if not 1 <= count <= DIMENSIONS:
        raise CheckpointError(f"the tensor {name!r:.80} has {count} dimensions")
    shape = tuple(header.number("<Q") for _ in range(count))[::-1]
    kind = _enum(GGMLQuantizationType, header.number("<I"), name)
    begin = header.number("<Q")
    width, size = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % width:
        raise CheckpointError(f"the tensor {name!r:.80} of {kind.name} has the shape {list(shape)}")
    return TensorInfo(name, shape, kind, begin, begin + math.prod(shape) // width * size)


def _place(infos, end, size, metadata):
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= LARGEST or alignment % 8:
        raise CheckpointError(f"general.alignment = {alignment!r:.80} is no multiple of 8")
    start = -(-end // alignment) * alignment
    names = set()
    for info in infos:
        if info.name in names:
            raise CheckpointError(f"it has the tensor {info.name!r:.80} twice")
        names.add(info.name)
        if info.begin % alignment or start + info.end > size:
            raise CheckpointError(
                f"the tensor {info.name!r:.80} of {info.type.name} {list(info.shape)} lies in the bytes "
                f"{start + info.begin} to {start + info.end} of a file of {size}"
            )
    return [info._replace(begin=start + info.begin, end=start + info.end) for info in infos]
