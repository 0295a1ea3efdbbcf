import numpy as np
import pytest

from warpformer import InputError
from warpformer.training import Denoising
from warpformer.training.objectives.words import Words

BOS, EOS, MASK = 1, 2, 4


@pytest.fixture(scope="module")
def make(english, tokenizer):
    return lambda *noises, **options: Denoising(english, tokenizer, max_length=128, noises=noises, **options)


def noised(objective, index, epoch=0):
    """(the text, what noise left of it)"""
    example = objective.example(index, epoch)
    source, target = example["source"], example["target"]
    assert source[0] == BOS
    assert source[-1] == EOS == target[-1]
    np.testing.assert_array_equal(target[:-1], objective.segments[index])
    left = np.sort(source[1:-1][source[1:-1] != MASK])
    np.testing.assert_array_equal(np.sort(target[~example["hidden"]]), np.sort(np.append(left, EOS)))
    return target[:-1], source[1:-1]


def is_filled_in(tokens, pattern):
    """Whether `pattern` is `tokens` where every <mask> may be any tokens, or none."""
    *pieces, last = np.split(pattern, np.flatnonzero(pattern == MASK))
    at = 0
    for number, piece in enumerate([*pieces, last]):
        piece = piece[piece != MASK].tolist()
        places = range(at, len(tokens) - len(piece) + 1) if number else [0]
        at = next((i for i in places if tokens[i : i + len(piece)].tolist() == piece), None)
        if at is None:
            return False
        at += len(piece)
    return at == len(tokens) or pattern[-1] == MASK or tokens[-len(piece) :].tolist() == piece


def test_infilling(make):
    objective = make("infilling")
    masks = missing = total = 0
    for epoch in range(8):
        for index in range(objective.examples):
            text, source = noised(objective, index, epoch)
            assert is_filled_in(text, source)
            assert len(source) <= len(text) + 1
            assert not ((source[1:] == MASK) & (source[:-1] == MASK)).any()
            count = (source == MASK).sum()
            assert len(text) - len(source) + count <= max(1, round(0.3 * len(text)))
            masks, missing = masks + count, missing + len(text) - len(source) + count
            total += len(text)
    assert 0.29 < missing / total < 0.305
    assert 2.7 < missing / masks < 3.1  # the last span of each text is cut


def test_spans_have_the_lengths_of_poisson(make):
    objective, random = make("infilling"), np.random.default_rng(0)
    spans = [objective.spans(random, 4000) for _ in range(30)]
    assert {s.sum() for s in spans} == {1200}
    lengths = np.concatenate([s[:-1] for s in spans])  # the last one is cut
    share = np.bincount(lengths, minlength=7)[:7] / len(lengths)
    factorials = np.array([1, 1, 2, 6, 24, 120, 720])
    expected = np.exp(-3) * 3.0 ** np.arange(7) / factorials
    assert (np.abs(share - expected) < 4 * (expected / len(lengths)) ** 0.5).all()


@pytest.mark.parametrize("length", range(1, 30))
def test_infilling_of_short_texts(make, length):
    objective, random = make("infilling"), np.random.default_rng(length)
    tokens = np.arange(10, 10 + length)
    for _ in range(200):
        source = np.append(tokens, MASK)[objective.infilling(random, tokens)]
        assert 1 <= len(source) <= length + 1
        assert MASK in source
        assert is_filled_in(tokens, source)


def test_permutation(make, tokenizer):
    objective, words, moved = make("permutation"), Words(tokenizer), 0
    for index in range(objective.examples):
        text, source = noised(objective, index)
        sentences = words.sentences(text)
        left = tokenizer.decode(source.tolist())
        assert sorted(source) == sorted(text)
        assert all(tokenizer.decode(sentence.tolist()) in left for sentence in sentences)
        moved += len(sentences) > 1 and not np.array_equal(text, source)
    assert moved > objective.examples / 3


def test_sentences(tokenizer):
    text = "“Go up!” he said. (Who?) Not... me.\nAnd “I” went, “yes”. Amen"
    tokens = np.array(tokenizer.encode(text).ids)
    found = [tokenizer.decode(sentence.tolist()) for sentence in Words(tokenizer).sentences(tokens)]
    assert found == ["“Go up!”", " he said.", " (Who?)", " Not...", " me.\n", "And “I” went, “yes”.", " Amen"]


def test_rotation(make):
    objective, begins = make("rotation"), set()
    for index in range(objective.examples):
        text, source = noised(objective, index)
        turns = [n for n in range(len(text)) if np.array_equal(np.roll(source, n), text)]
        assert turns
        begins |= {*turns}
    assert len(begins) > 40


def test_deletion(make):
    objective = make("deletion", deleted=0.2)
    for index in range(objective.examples):
        text, source = noised(objective, index)
        assert len(source) == len(text) - round(0.2 * len(text))
        left = iter(text)
        assert all(token in left for token in source)  # in their order


def test_all_noises_in_their_order(make):
    objective = make("deletion", "infilling", "permutation", "rotation")
    text, source = noised(objective, 5)
    assert set(source) <= {*text, MASK}
    assert len(source) < len(text)


def test_refusals(make):
    with pytest.raises(InputError, match="noises"):
        make("other")
    with pytest.raises(InputError, match="masked = 1"):
        make("infilling", masked=1.0)
