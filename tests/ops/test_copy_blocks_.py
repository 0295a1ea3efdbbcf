import pytest
import torch

from tests.check import host_reads, same_bits, threads
from warpformer import _C, ops

SHAPES = [(9, 6, 2, 36), (9, 6, 2), (9, 1, 1), (9, 32, 8, 64)]  # of caches, and of scales


def copied(cache, old, new, count):
    cache = cache.clone()
    for i, j in zip(old.tolist(), new.tolist(), strict=True):
        cache[j, :count] = cache[i, :count]
    return cache


def check(cache, old, new, count):
    old, new = torch.tensor(old), torch.tensor(new)
    expected = copied(cache, old, new, count)
    assert ops.copy_blocks_(cache, old, new, count) is None
    assert same_bits(cache, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
def test_values(device, shape, kind):
    for count in sorted({0, 1, shape[1] // 2, shape[1]}):
        for used in (1, 3):
            with threads(used):
                check(torch.randn(shape).to(kind), [3, 3, 0, 8], [1, 2, 7, 5], count)


def test_one_after_the_other(device):
    check(torch.randn(5, 4, 3), [0, 1, 2, 4], [1, 2, 2, 0], 3)


def test_chains_and_blocks_outside(device):
    """More copies than a GPU has on their way at once, each of what the last one wrote."""
    order = torch.randperm(30).tolist()
    check(torch.randn(30, 4, 4), order[:-1], order[1:], 3)
    if not host_reads(_C.copy_blocks_):
        cache = torch.randn(5, 4, 4)
        expected = copied(cache, torch.tensor([1]), torch.tensor([3]), 4)
        ops.copy_blocks_(cache, torch.tensor([5, 1, -1, 0]), torch.tensor([0, 3, 2, 1 << 40]), 4)
        assert same_bits(cache, expected)


def test_none(device):
    cache = torch.randn(5, 4, 3)
    none = torch.zeros(0, dtype=torch.int64)
    for of in (cache, cache[:, :0].clone(), cache[..., :0].clone()):
        before = of.clone()
        ops.copy_blocks_(of, none, none, 0)
        assert same_bits(of, before)


def test_through_torch_library():
    cache, old, new = torch.randn(5, 4, 3), torch.tensor([0, 1]), torch.tensor([2, 3])
    torch.library.opcheck(torch.ops.warpformer.copy_blocks_.default, (cache, old, new, 2))
