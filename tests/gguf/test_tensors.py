"""What each type of tensor is read as, against gguf's own dequantization."""

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize as gguf_dequantize

import warpformer as wf
from tests.check import relative_error, same_bits
from tests.gguf.files import quantized, write
from warpformer import ops
from warpformer.gguf import _tensor, open_gguf
from warpformer.ops._quantized import check_quantized
from warpformer.quantization import dequantize

DENSE = {
    "F32": np.float32,
    "F16": np.float16,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}
BLOCKS = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M",
    "TQ1_0", "TQ2_0", "MXFP4",
]  # fmt: skip


def read(path, value, name="blk.0.attn_v.weight"):
    """The tensor of a file that has it alone."""
    (tensor,) = open_gguf(write(path / "one.gguf", {name: value})).tensors.values()
    return tensor


def expected(rows, kind):
    with np.errstate(all="ignore"):
        return torch.from_numpy(gguf_dequantize(rows, kind))


@pytest.mark.parametrize("shape", [(5,), (3, 8), (2, 3, 4)])
@pytest.mark.parametrize("kind", DENSE)
def test_plain(tmp_path, kind, shape):
    values = (np.random.default_rng(0).standard_normal(shape) * 50).astype(DENSE[kind])
    tensor = read(tmp_path, values)
    assert tensor.shape == shape
    assert same_bits(tensor.read(), torch.from_numpy(values))
    assert tensor.read().dtype == tensor.dtype
    assert same_bits(tensor.read_dense(), torch.from_numpy(values).float())


def test_bfloat16(tmp_path):
    values = torch.randn(6, 32).bfloat16()
    tensor = read(tmp_path, (values.view(torch.uint8).numpy(), Type.BF16))
    assert (tensor.dtype, tensor.shape) == (torch.bfloat16, (6, 32))
    assert same_bits(tensor.read(), values)


def test_floats_lie_in_the_file(tmp_path):
    tensor = read(tmp_path, np.ones((3, 4), np.float32))
    first = tensor.read()
    assert first.data_ptr() == tensor.read().data_ptr()
    first.zero_()  # a copy of the page, not the file
    assert open_gguf(tmp_path / "one.gguf").tensors.popitem()[1].read().all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(_tensor, "BLOCK", 5 * 256)
    rows, kind = quantized((37, 512), Type[kind])
    tensor = read(tmp_path, (rows, kind))
    truth = expected(rows, kind)
    assert (tensor.shape, tensor.dtype) == ((37, 512), kind.name)
    assert same_bits(tensor.read_dense(), truth)
    assert same_bits(tensor.read_dense(torch.bfloat16), truth.bfloat16())
    value = tensor.read()
    if kind.name not in ("Q4_0", "Q8_0"):
        assert same_bits(value, truth)
        return
    check_quantized(value)
    assert (value.format, value.group_size) == ("int4" if kind.name == "Q4_0" else "int8", 32)
    assert value.scales.dtype == torch.float16
    assert torch.equal(dequantize(value), truth)
    unpacked = ops.unpack_linear(ops.pack_linear(value))
    assert torch.equal(unpacked.values, value.values)
    assert torch.equal(unpacked.scales, value.scales.float())


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_product_with_the_packed_weight(tmp_path, kind):
    rows, kind = quantized((64, 256), Type[kind])
    x = torch.randn(64, 256)
    out = ops.linear(x, ops.pack_linear(read(tmp_path, (rows, kind)).read()))
    assert relative_error(out, x.double() @ expected(rows, kind).double().mT) < 1e-5


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_several_matrices(tmp_path, kind):
    rows, kind = quantized((3, 8, 64), Type[kind])
    value = read(tmp_path, (rows, kind)).read()
    assert value.scales.shape == (3, 8, 2)
    for e in range(3):
        one = value._replace(values=value.values[e], scales=value.scales[e])
        assert torch.equal(dequantize(one), expected(rows[e], kind))


def test_a_vector_becomes_floats(tmp_path):
    rows, kind = quantized((64,), Type.Q8_0)
    assert same_bits(read(tmp_path, (rows, kind)).read(), expected(rows, kind))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q6_K"])
@pytest.mark.parametrize(("name", "heads"), [("attn_q", 4), ("attn_k", 2)])
def test_rows_of_heads(tmp_path, kind, name, heads):
    """Beside each other lie rows whose distance in a checkpoint is half a head."""
    rows, kind = quantized((16 * heads, 256), Type[kind])
    tensor = read(tmp_path, (rows, kind), f"blk.0.{name}.weight")
    order = [h * 16 + i + half * 8 for h in range(heads) for i in range(8) for half in (0, 1)]
    truth = torch.empty(16 * heads, 256)
    truth[order] = expected(rows, kind)
    assert same_bits(tensor.read_dense(), truth)
    value = tensor.read()
    assert torch.equal(dequantize(value) if isinstance(value, ops.QuantizedWeight) else value.float(), truth)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_not_finite(tmp_path, kind, scale):
    rows, kind = quantized((4, 64), Type[kind])
    rows[2, :2] = np.array([scale], np.float16).view(np.uint8)
    tensor = read(tmp_path, (rows, kind))
    with pytest.raises(wf.CheckpointError, match=r"blk\.0\.attn_v\.weight.* scale that is NaN or infinity"):
        tensor.read()


def test_a_type_that_gguf_cannot_dequantize(tmp_path):
    tensor = read(tmp_path, (np.zeros((2, 292), np.uint8), Type.Q8_K))
    with pytest.raises(wf.CheckpointError, match=r"blk\.0\.attn_v\.weight.*Q8_K"):
        tensor.read()
