import numpy as np
import pytest

from tests.training.test_language_modelling import texts_of
from warpformer import InputError
from warpformer.training import SpanCorruption
from warpformer.training.objectives.span_corruption import pieces

EOS = 2
FIRST, LAST = 599, 560  # <extra_id_0>, <extra_id_39>


def test_source_and_target_make_the_text(english, tokenizer):
    objective = SpanCorruption(english, tokenizer, max_length=128)
    missing = spans = total = 0
    for index in range(objective.examples):
        text = objective.segments[objective.rows[index]]
        source, target, hidden = objective.example(index, 1).values()
        np.testing.assert_array_equal(hidden, (target < LAST) & (target != EOS))
        assert source[-1] == EOS == target[-1]
        assert len(source) + len(target) == objective.lengths()[index]
        places = np.flatnonzero(source >= LAST)
        assert source[places].tolist() == list(range(FIRST, FIRST - len(places), -1))
        assert target[target >= LAST].tolist() == source[places].tolist()
        assert target[0] == FIRST
        gone = [span[1:] for span in np.split(target[:-1], np.flatnonzero(target >= LAST))[1:]]
        kept = [span[span < LAST] for span in np.split(source[:-1], places)]
        assert all(len(span) for span in [*gone, *kept[:-1]])
        assert not len(kept[-1])
        whole = np.concatenate([part for both in zip(kept, gone, strict=False) for part in both])
        np.testing.assert_array_equal(whole, text)
        missing, spans = missing + sum(map(len, gone)), spans + len(gone)
        total += len(text)
    assert abs(missing / total - 0.15) < 0.005
    assert abs(missing / spans - 3) < 0.2


@pytest.mark.parametrize("length", range(2, 40))
def test_short_texts(tokenizer, length):
    objective = SpanCorruption(texts_of(["a" + " b" * 50]), tokenizer, max_length=128, fraction=0.5)
    missing, spans = objective.counts(length)
    assert 1 <= spans <= missing < length
    assert spans <= length - missing


def test_pieces_are_uniform():
    random = np.random.default_rng(0)
    found = [tuple(pieces(random, 5, 3)) for _ in range(6000)]
    ways = [(a, b, 5 - a - b) for a in range(1, 4) for b in range(1, 5 - a)]
    assert set(found) == set(ways)
    assert all(abs(found.count(way) - 1000) < 120 for way in ways)
    assert pieces(random, 4, 1).tolist() == [4]
    assert pieces(random, 3, 3).tolist() == [1, 1, 1]


def test_refusals(english, tokenizer):
    with pytest.raises(InputError, match="'<extra_id_40>'"):
        SpanCorruption(english, tokenizer, max_length=512, fraction=0.5, mean_span=1)
    with pytest.raises(InputError, match="fraction = 0"):
        SpanCorruption(english, tokenizer, max_length=64, fraction=0)
    with pytest.raises(InputError, match="two tokens"):
        SpanCorruption(texts_of(["a"]), tokenizer, max_length=64)
    counted = SpanCorruption(texts_of(["a"], ["a b c"]), tokenizer, max_length=64)
    assert counted.skipped == {"text of one token": 1}
    assert counted.examples == 1
