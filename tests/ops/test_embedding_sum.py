import pytest
import torch
import torch.nn.functional as F

from tests.check import check, check_gradients, host_reads, same_bits, threads
from warpformer import _C, InputError, ops

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
    indices = [torch.zeros_like(index), index]
    if host_reads(_C.embedding_sum):
        with pytest.raises(InputError, match=rf"^embedding_sum: .* row = {row}, table = f32\[7,5\] cpu"):
            ops.embedding_sum(indices, tables)
        return
    out = ops.embedding_sum(indices, tables)
    others = torch.arange(100) != position
    assert out[position].isnan().all()
    assert same_bits(out[others], (tables[0][0] + tables[1][0]).expand(99, 5))


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
@pytest.mark.parametrize(("vocabulary", "width"), [(50, 131), (1000, 33), (3, 300), (5, 700)])
def test_gradients(device, dtype, vocabulary, width, padding_idx):
    if padding_idx == 3 and vocabulary < 4:
        padding_idx = 0
    index = torch.randint(vocabulary, (6, 100))
    check_gradients(
        lambda table: ops.embedding(index, table, padding_idx),
        lambda table: F.embedding(index, table, padding_idx),
        torch.randn(vocabulary, width, dtype=dtype),
    )


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_gradient_of_a_narrow_table(device, dtype, padding_idx):
    """Of 1 and -1, whose sums are exact in every dtype, so that two values can be judged."""
    index, table = torch.randint(2, (6, 100)), torch.randn(2, 1, dtype=dtype, requires_grad=True)
    grad = torch.randint(2, (6, 100, 1)).mul(2).sub(1).to(dtype)
    expected = torch.autograd.grad(F.embedding(index, table, padding_idx), table, grad)[0]
    assert same_bits(torch.autograd.grad(ops.embedding(index, table, padding_idx), table, grad)[0], expected)


def test_gradients_of_broadcast_indices(device, dtype):
    token, position, segment = torch.randint(50, (6, 20)), torch.arange(20), torch.tensor(1)
    check_gradients(
        lambda *tables: ops.embedding_sum((token, position, segment), tables, padding_idx=(0, None, None)),
        lambda *tables: sum(
            map(F.embedding, (token, position.expand(6, 20), segment), tables, (0, None, None))
        ),
        *(torch.randn(v, 33, dtype=dtype) for v in (50, 20, 2)),
    )


def test_gradient_in_any_number_of_threads(device, dtype):
    table, index = torch.randn(30, 600, dtype=dtype, requires_grad=True), torch.randint(30, (700,)) // 2
    grad, gradients = torch.randn(700, 600, dtype=dtype), []
    for count in (1, 2, 3):
        with threads(count):
            gradients += torch.autograd.grad(ops.embedding(index, table), table, grad)
    assert all(same_bits(gradients[0], other) for other in gradients[1:])
    assert (gradients[0][15:] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), ()])
@pytest.mark.parametrize("width", [0, 1, 5])
def test_gradient_of_small_shapes(device, shape, width):
    table, index = torch.randn(3, width, requires_grad=True), torch.zeros(shape, dtype=torch.int64)
    out = ops.embedding(index, table)
    expected = torch.autograd.grad(F.embedding(index, table), table, torch.ones_like(out))[0]
    assert same_bits(torch.autograd.grad(out, table, torch.ones_like(out))[0], expected)


def test_out(device, dtype):
    table, index = torch.randn(50, 17, dtype=dtype), torch.randint(50, (8, 9))
    out = torch.empty(8, 9, 34)[..., ::2]
    assert ops.embedding(index, table, out=out) is out
    assert torch.equal(out, table[index].float())


@pytest.mark.parametrize("padding_idx", [7, -8])
def test_padding_outside_its_table(padding_idx):
    with pytest.raises(InputError, match=f"embedding_sum: padding_idx = {padding_idx} is outside its table"):
        ops.embedding(torch.zeros(3, dtype=torch.int64), torch.randn(7, 5), padding_idx)
    with pytest.raises(InputError, match=r"embedding_sum: padding_idx = .* is not one for each table"):
        ops.embedding_sum([torch.zeros(3, dtype=torch.int64)], [torch.randn(7, 5)], padding_idx=[0, 0])
