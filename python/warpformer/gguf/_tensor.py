"""Tensors of a GGUF file, which are read where they lie. A row is a row of blocks:

    Q4_0   f16 scale, 16 bytes: the codes 0 to 15 in the low halves, 16 to 31 in the high ones
    Q8_0   f16 scale, 32 int8

Both are formats of ours up to the order of their bytes. All else becomes floats.
"""

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from warpformer import ops
from warpformer.checkpoint import MappedFile
from warpformer.models._config import CheckpointError

GROUP = 32  # weights of a block of Q4_0 or Q8_0
BLOCK = 1 << 20  # weights at a time, which take some bytes each while they are converted
DTYPES = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
    GGMLQuantizationType.I8: torch.int8,
    GGMLQuantizationType.I16: torch.int16,
    GGMLQuantizationType.I32: torch.int32,
    GGMLQuantizationType.I64: torch.int64,
}
FORMATS = {GGMLQuantizationType.Q4_0: "int4", GGMLQuantizationType.Q8_0: "int8"}


class GgufTensor:
    """A tensor of a GGUF file, as the Hugging Face checkpoint of the model has it.

    Attributes:
        key: its name in the file.
        shape: a tuple.
        dtype: a torch dtype; the name of the type, as "Q4_K", of one that is quantized.
    """

    def __init__(
        self, file: MappedFile, key, shape, type, begin, end, *, heads: int = 0, offset: float = 0.0
    ):
        self.key = key
        self.shape = tuple(shape)
        self.dtype = DTYPES.get(type, type.name)
        self._type = type
        self._file = file
        self._begin, self._end = begin, end
        self._data = np.frombuffer(file.bytes, np.uint8, end - begin, begin)
        self._heads = heads  # whose rows lie in pairs (i, i + D / 2), as llama.cpp's rope takes them
        self._offset = offset  # that was added to the values

    @property
    def format(self) -> str | None:
        """Of the QuantizedWeight that `read` gives; None if that is a tensor."""
        packed = self._type in FORMATS and len(self.shape) > 1 and not self._offset
        return FORMATS[self._type] if packed else None

    def read(self) -> Tensor | ops.QuantizedWeight:
        """The values: a matrix of Q4_0 or Q8_0, or several, stays packed, in "int4" or "int8" with groups of
        32 and its float16 scales; other quantized types become float32. Floats lie in the mapped file: copy
        what is to stay, and `release` it.

        Raises:
            CheckpointError: a scale is not finite, or `gguf` cannot dequantize the type.
        """
        if self.format:
            return self._quantized()
        return self.read_dense(self.dtype if isinstance(self.dtype, torch.dtype) else torch.float32)

    def read_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as floats; quantized ones are computed in float32, and rounded to `dtype` a block of
        rows at a time."""
        if isinstance(self.dtype, torch.dtype):
            values = torch.from_numpy(self._data).view(self.dtype).view(self.shape).to(dtype)
        else:
            values = self._dequantized(dtype)
        if self._heads:
            values = _split_halves(values, self._heads)
        return values - self._offset if self._offset else values

    def part(self, index: int) -> "GgufTensor":
        """That of one expert."""
        size = len(self._data) // self.shape[0]
        begin = self._begin + index * size
        return GgufTensor(self._file, f"{self.key}[{index}]", self.shape[1:], self._type, begin, begin + size)

    def release(self) -> None:
        """Lets the memory of what was read go."""
        self._file.release(self._begin, self._end)

    def _rows(self):
        """Bytes of each row, and slices of some of them."""
        width, size = GGML_QUANT_SIZES[self._type]
        rows = self._data.reshape(-1, self.shape[-1] // width * size)
        step = max(1, BLOCK // self.shape[-1])
        return rows, [slice(first, first + step) for first in range(0, len(rows), step)]

    def _dequantized(self, dtype):
        rows, slices = self._rows()
        values = torch.empty(len(rows), self.shape[-1], dtype=dtype)
        for some in slices:
            try:
                with np.errstate(all="ignore"):  # NaN and infinities may be in the file
                    values[some] = torch.from_numpy(dequantize(rows[some], self._type))
            except NotImplementedError as error:
                raise CheckpointError(f"the tensor {self.key!r:.80}: {error}") from error
        return values.view(self.shape)

    def _quantized(self):
        rows, slices = self._rows()
        depth, is_int4 = self.shape[-1], self._type == GGMLQuantizationType.Q4_0
        values = np.empty((len(rows), depth // 2 if is_int4 else depth), np.uint8)
        scales = np.empty((len(rows), depth // GROUP), np.float16)
        for some in slices:
            blocks = rows[some].reshape(-1, depth // GROUP, 2 + GROUP // (2 if is_int4 else 1))
            scales[some] = blocks[..., :2].view(np.float16)[..., 0]
            codes = blocks[..., 2:]
            values[some] = (_to_neighbours(codes) if is_int4 else codes).reshape(len(blocks), -1)
        if not np.isfinite(scales).all():
            raise CheckpointError(f"the tensor {self.key!r:.80} has a scale that is NaN or infinity")
        tensors = [torch.from_numpy(values if is_int4 else values.view(np.int8)), torch.from_numpy(scales)]
        if self._heads:
            tensors = [_split_halves(tensor, self._heads) for tensor in tensors]
        values, scales = (tensor.view(*self.shape[:-1], -1) for tensor in tensors)
        return ops.QuantizedWeight(values, scales, None, FORMATS[self._type], depth, GROUP)


class JoinedTensor:
    """Tensors of a GGUF file that are one of a checkpoint, joined expert by expert or head by head."""

    dtype = "joined"

    def __init__(self, parts, shape, join):
        self.key = " and ".join(part.key for part in parts)
        self.shape = shape
        self._parts, self._join = parts, join

    def read_dense(self) -> Tensor:
        """float32."""
        count = self._parts[0].shape[0]
        values = torch.empty(self.shape)
        for i, piece in enumerate(values.view(count, -1)):
            piece.copy_(self._join(*(part.part(i).read_dense() for part in self._parts)).flatten())
        return values

    def release(self) -> None:
        for part in self._parts:
            part.release()


def interleaved(gate: GgufTensor, up: GgufTensor) -> JoinedTensor:
    """[E, 2 N, ...]: the rows 2 n and 2 n + 1 are the rows n of the two, as gpt-oss has them."""
    if gate.shape != up.shape or len(gate.shape) < 2:
        raise _do_not_fit(gate, up)
    experts, rows, *rest = gate.shape
    return JoinedTensor([gate, up], (experts, 2 * rows, *rest), lambda *two: torch.stack(two, 1))


def keys_and_values(keys: GgufTensor, values: GgufTensor) -> JoinedTensor:
    """[H (D + D'), R]: of each head the rows of keys, which are stored as [R, D], and those of values."""
    if not len(keys.shape) == len(values.shape) == 3 or keys.shape[:2] != (values.shape[0], values.shape[2]):
        raise _do_not_fit(keys, values)
    heads, rank, width = keys.shape
    shape = heads * (width + values.shape[1]), rank
    return JoinedTensor([keys, values], shape, lambda k, v: torch.cat((k.mT, v)))


def _do_not_fit(a, b):
    shapes = f"{list(a.shape)} and {list(b.shape)}"
    return CheckpointError(f"the tensors {a.key!r:.80} and {b.key!r:.80} of {shapes} do not fit each other")


def _to_neighbours(codes):
    """Bytes of the codes j and j + 16 -> bytes of the codes 2 j and 2 j + 1."""
    low, high = codes & 15, codes >> 4
    pairs = [half[..., 0::2] | half[..., 1::2] << 4 for half in (low, high)]
    return np.concatenate(pairs, -1)


def _split_halves(rows, heads):
    """Rows (i, i + D / 2) of each head, which lie beside each other -> the halves of the head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
