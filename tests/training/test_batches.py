import numpy as np
import pytest

from warpformer import InputError
from warpformer.training import Batches, Seq2Seq


@pytest.fixture(scope="module")
def objective(pairs, tokenizer):
    return Seq2Seq(pairs, tokenizer, max_length=128)


def test_every_example_once_within_the_limit(objective):
    batches = Batches(objective, 1000)
    for epoch in range(3):
        found = batches.epoch(epoch)
        assert sorted(index for batch in found for index in batch) == list(range(objective.examples))
        sums = [objective.lengths()[batch].sum() for batch in found]
        assert max(sums) <= 1000
        assert np.mean(sums) > 850
        assert all(objective.batch(batch, epoch).tokens <= 1000 for batch in found[:9])


def test_lengths_are_alike(objective):
    lengths = objective.lengths()
    spread = [np.ptp(lengths[batch]) for batch in Batches(objective, 2000).epoch(0)]
    assert np.median(spread) < np.ptp(lengths) / 8


def test_order_is_a_function_of_seed_and_epoch(objective):
    batches = Batches(objective, 1000, seed=1)
    epoch = batches.epoch(3)
    assert epoch == Batches(objective, 1000, seed=1).epoch(3)
    assert epoch != batches.epoch(2)
    assert epoch != Batches(objective, 1000, seed=2).epoch(3)


def test_ranks_share_an_epoch(objective):
    whole = Batches(objective, 1000).epoch(0)
    ranks = [Batches(objective, 1000, rank=rank, world=3).epoch(0) for rank in range(3)]
    assert {len(rank) for rank in ranks} == {len(whole) // 3}
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == whole[: 3 * len(ranks[0])]


def test_refusals(objective):
    with pytest.raises(InputError, match="max_tokens = 9"):
        Batches(objective, 9)
    with pytest.raises(InputError, match="10000 processes"):
        Batches(objective, 1000, world=10000).epoch(0)
