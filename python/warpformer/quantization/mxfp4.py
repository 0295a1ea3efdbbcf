import torch
from torch import Tensor

from warpformer._C import InputError
from warpformer.models._config import CheckpointError
from warpformer.ops._quantized import describe

BLOCK = 1 << 22  # bytes of codes at a time, each of which takes 4 as an index
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of e2m1, to which 8 is added where they are negative


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers of a weight in MXFP4, as the checkpoints of gpt-oss have its experts.

        w[k] = 2^(scales[k // 32] - 127) e2m1(code[k])      e2m1: +-0, 0.5, 1, 1.5, 2, 3, 4, 6

    Args:
        blocks: uint8 [..., N, K / 32, 16], two codes a byte, the low half an even k: `*_blocks`.
        scales: uint8 [..., N, K / 32], 255 for NaN: `*_scales`.

    Returns:
        bfloat16 [..., N, K], which hold them exactly, but for infinities where a scale is beyond 2^125. They
        are as `ops.pack_linear` takes experts; the parameter of transformers is transposed, [..., K, N].

    Raises:
        InputError: the shapes do not fit each other, or a dtype is another.
        TypeError: an argument is not a tensor.

    Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification" (2023).
    """
    for name, tensor in (("blocks", blocks), ("scales", scales)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"dequantize_mxfp4: {name} must be a torch.Tensor, not {type(tensor).__name__}")
    uint8 = blocks.dtype == scales.dtype == torch.uint8
    if not uint8 or blocks.ndim < 2 or blocks.shape != (*scales.shape, 16):
        raise InputError(
            f"dequantize_mxfp4: blocks = {describe(blocks)} and scales = {describe(scales)} are not "
            "uint8 [..., K / 32, 16] and [..., K / 32]"
        )
    pairs, factors = (table.to(blocks.device) for table in _tables())
    numbers = torch.empty(scales.numel(), 32, dtype=torch.bfloat16, device=blocks.device)
    parts = (whole.split(BLOCK // 16) for whole in (numbers, blocks.reshape(-1, 16), scales.flatten()))
    for to, codes, exponents in zip(*parts, strict=True):
        found = pairs.index_select(0, codes.flatten().int()).view(torch.bfloat16).view_as(to)
        torch.mul(found, factors.index_select(0, exponents.int())[:, None], out=to)
    return numbers.view(*scales.shape[:-1], 32 * scales.shape[-1])


class Mxfp4Tensor:
    """A weight in MXFP4 as a tensor of a checkpoint: what `dequantize_mxfp4` makes of two tensors there.

    Attributes:
        key: its name, that of the two less their endings.
        shape: of the numbers, [..., N, K].
        dtype: "MXFP4".
    """

    dtype = "MXFP4"

    def __init__(self, key: str, blocks, scales):
        self.key = key
        self.shape = (*scales.shape[:-1], 32 * scales.shape[-1])
        self._blocks, self._scales = blocks, scales

    def read_dense(self) -> Tensor:
        """bfloat16.

        Raises:
            CheckpointError: the two tensors do not fit each other.
        """
        try:
            return dequantize_mxfp4(self._blocks.read(), self._scales.read())
        except InputError as error:
            raise CheckpointError(f"{self.key!r:.80}: {error}") from error

    def release(self) -> None:
        self._blocks.release()
        self._scales.release()


def joined_mxfp4(tensors: dict) -> dict:
    """The tensors of a checkpoint with an Mxfp4Tensor for each <name>_blocks and <name>_scales."""
    joined = dict(tensors)
    for key in tensors:
        name = key.removesuffix("_blocks")
        if name != key and f"{name}_scales" in tensors and tensors[f"{name}_scales"].shape:
            joined[name] = Mxfp4Tensor(name, joined.pop(key), joined.pop(f"{name}_scales"))
    return joined


def _tables():
    """Of a byte, its two numbers as the bits of an int32; and of an exponent, the power of two."""
    numbers = torch.tensor([*NUMBERS, *(-number for number in NUMBERS)], dtype=torch.bfloat16)
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte & 15], numbers[byte >> 4]), 1).view(torch.int32).flatten()
    factors = torch.exp2(byte.double() - 127).bfloat16()
    factors[255] = torch.nan
    return pairs, factors
