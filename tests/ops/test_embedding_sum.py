import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import InputError, ops

SIZES = (1, 15, 16, 17, 31, 32, 33, 255, 256, 257)


@pytest.mark.parametrize("tables", [1, 2, 3, 4])
@pytest.mark.parametrize("width", SIZES)
def test_values(device, dtype, tables, width):
    indices = [torch.randint(9, (4096 // width + 1,)) for _ in range(tables)]
    check(
        lambda *tables: ops.embedding_sum(indices, tables),
        lambda *tables: sum(F.embedding(i, t) for i, t in zip(indices, tables, strict=True)),
        *torch.randn(tables, 9, width, dtype=dtype),
    )


def test_broadcast_indices(device, dtype):
    """BERT's: token [B, T], position [T], segment a single 0."""
    tables = [torch.randn(v, 33, dtype=dtype) for v in (50, 20, 2)]
    token, position, segment = torch.randint(50, (6, 20)), torch.arange(20), torch.tensor(0)
    whole = [i.expand(6, 20).contiguous() for i in (token, position, segment)]
    out = ops.embedding_sum((token, position, segment), tables)
    assert out.shape == (6, 20, 33)
    assert same_bits(out, ops.embedding_sum(whole, tables))


def test_index_dtype_and_strides(device, dtype):
    table, index = torch.randn(50, 17, dtype=dtype), torch.randint(50, (8, 9))
    expected = table[index]
    for same in (index, index.int(), index.mT.contiguous().mT, index.repeat_interleave(2, 1)[:, ::2]):
        assert same_bits(ops.embedding_sum([same], [table]), expected)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
@pytest.mark.parametrize("width", [0, 1, 5])
def test_small_shapes(device, dtype, shape, width):
    table, index = torch.randn(3, width, dtype=dtype), torch.zeros(shape, dtype=torch.int64)
    assert same_bits(ops.embedding_sum([index], [table]), table[index])


@pytest.mark.parametrize("row", [-1, 7, 2**40, -(2**40)])
@pytest.mark.parametrize("position", [0, 99])
def test_index_outside_its_table(device, row, position):
    index = torch.zeros(100, dtype=torch.int64)
    index[position] = row
    tables = [torch.randn(9, 5), torch.randn(7, 5)]
    with pytest.raises(InputError, match=rf"^embedding_sum: .* row = {row}, table = f32\[7,5\] cpu"):
        ops.embedding_sum([torch.zeros_like(index), index], tables)
