from unittest import mock

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import warpformer as wf
from tests.check import same_bits
from warpformer.quantization import dequantize_mxfp4, mxfp4


def test_against_transformers():
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 10, 4), dtype=torch.uint8)
    found = dequantize_mxfp4(blocks, scales)
    assert found.shape == (3, 10, 128)
    assert same_bits(found.mT.contiguous(), convert_moe_packed_tensors(blocks, scales))


def test_every_number_of_every_scale_is_exact():
    codes = torch.arange(16).repeat(2)
    blocks = (codes[::2] | codes[1::2] << 4).to(torch.uint8).expand(256, 1, 16)
    scales = torch.arange(256).to(torch.uint8)[:, None]
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    exact = torch.cat([numbers, -numbers]).repeat(2) * torch.exp2(torch.arange(256.0).double() - 127)[:, None]
    exact[255] = torch.nan
    exact[exact.abs() >= 2.0**128] = exact[exact.abs() >= 2.0**128].sign() * torch.inf
    found = dequantize_mxfp4(blocks, scales)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[:255].signbit(), exact[:255].signbit())


def test_some_blocks_at_a_time():
    blocks = torch.randint(0, 256, (7, 3, 16), dtype=torch.uint8)
    scales = torch.randint(120, 130, (7, 3), dtype=torch.uint8)
    whole = dequantize_mxfp4(blocks, scales)
    with mock.patch.object(mxfp4, "BLOCK", 64):
        assert same_bits(dequantize_mxfp4(blocks, scales), whole)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 1), (1,)])
def test_shapes(shape):
    blocks, scales = torch.zeros(*shape, 16, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8)
    assert dequantize_mxfp4(blocks, scales).shape == (*shape[:-1], 32 * shape[-1])


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (torch.zeros(3, 2, 16), torch.zeros(3, 2).byte(), r"blocks = float32\[3, 2, 16\]"),
        (torch.zeros(3, 2, 16).byte(), torch.zeros(3, 2), r"scales = float32\[3, 2\]"),
        (torch.zeros(3, 2, 15).byte(), torch.zeros(3, 2).byte(), r"blocks = uint8\[3, 2, 15\]"),
        (torch.zeros(3, 2, 16).byte(), torch.zeros(3, 1).byte(), r"scales = uint8\[3, 1\]"),
        (torch.zeros(16).byte(), torch.tensor(1).byte(), r"scales = uint8\[\]"),
    ],
)
def test_bad_input(blocks, scales, message):
    with pytest.raises(wf.InputError, match=message):
        dequantize_mxfp4(blocks, scales)
    with pytest.raises(TypeError, match=r"blocks must be a torch\.Tensor, not list"):
        dequantize_mxfp4([], scales)
