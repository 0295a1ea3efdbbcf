import numpy as np
import pytest

from tests.training.test_language_modelling import texts_of
from warpformer import InputError
from warpformer.training import MaskedLM
from warpformer.training.objectives.words import Words

BOS, EOS, MASK = 1, 2, 4
EPOCHS = range(12)


@pytest.fixture(scope="module")
def objective(english, tokenizer):
    return MaskedLM(english, tokenizer, max_length=96)


def examples(objective):
    return [objective.example(i, epoch) for epoch in EPOCHS for i in range(objective.examples)]


def original(example):
    tokens = example["tokens"].copy()
    tokens[example["places"]] = example["labels"]
    return tokens


def within(count, total, probability):
    """Four standard deviations of a binomial distribution."""
    return abs(count - probability * total) < 4 * (total * probability * (1 - probability)) ** 0.5


def test_fraction_of_targets(objective):
    for example in examples(objective)[:500]:
        text = len(example["tokens"]) - 3
        assert len(example["places"]) == max(1, round(0.15 * text))
        assert (np.diff(example["places"]) > 0).all()
        assert not set(example["labels"]) & {BOS, EOS}


def test_80_10_10(objective):
    found = examples(objective)
    seen = np.concatenate([example["tokens"][example["places"]] for example in found])
    labels = np.concatenate([example["labels"] for example in found])
    total, vocabulary = len(labels), len(objective.ordinary)
    assert total > 20000
    assert within((seen == MASK).sum(), total, 0.8)
    assert within((seen == labels).sum(), total, 0.1 + 0.1 / vocabulary)
    replaced = seen[(seen != MASK) & (seen != labels)]
    assert within(len(replaced), total, 0.1 * (1 - 1 / vocabulary))
    assert set(replaced) <= set(objective.ordinary)
    assert len(set(replaced)) > vocabulary * 0.9
    assert set(objective.ordinary) == set(range(5, 560))  # neither special tokens nor sentinels


def test_half_of_the_pairs_follow(objective):
    found = examples(objective)
    assert within(sum(int(example["pair"]) == 0 for example in found), len(found), 0.5)
    segments = [tuple(objective.segments[i]) for i in range(len(objective.segments))]
    for index in range(objective.examples):
        example = objective.example(index, 0)
        tokens = original(example)
        middle, end = np.flatnonzero(tokens == EOS)
        first, second = tuple(tokens[1:middle]), tuple(tokens[middle + 1 : end])
        assert tokens[0] == BOS
        assert end == len(tokens) - 1
        assert example["types"].tolist() == [0] * (middle + 1) + [1] * (end - middle)
        assert first == segments[objective.firsts[index]]
        follower = segments[objective.firsts[index] + 1]
        assert (second == follower) == (example["pair"] == 0)
        assert second in segments
        assert second != first


def test_other_segments_are_all_others(objective):
    random = np.random.default_rng(0)
    found = {objective.other(random, 3) for _ in range(9000)}
    assert found == set(range(len(objective.segments))) - {3, 4}


def test_whole_words(english, tokenizer):
    objective = MaskedLM(english, tokenizer, max_length=96, whole_word=True)
    words = Words(tokenizer)
    count = total = 0
    for example in examples(objective)[:500]:
        tokens = original(example)
        starts = words.starts(tokens)
        starts |= np.isin(tokens, [BOS, EOS]) | np.isin(np.roll(tokens, 1), [BOS, EOS])
        ids = starts.cumsum()
        chosen = set(ids[example["places"]])
        np.testing.assert_array_equal(np.flatnonzero(np.isin(ids, list(chosen))), example["places"])
        count, total = count + len(example["places"]), total + len(tokens) - 3
    assert 0.13 < count / total <= 0.15


def test_words(tokenizer):
    text = "God's “Spirit” 12 Jehová, mañana."
    tokens = np.array(tokenizer.encode(text).ids)
    words = np.split(tokens, np.flatnonzero(Words(tokenizer).starts(tokens))[1:])
    decoded = [tokenizer.decode(word.tolist()) for word in words]
    assert "".join(decoded) == text
    assert {" 12", " Jehová", " mañana", "Spirit"} <= set(decoded)


def test_without_next_sentence(english, tokenizer):
    objective = MaskedLM(english, tokenizer, max_length=64, next_sentence=False)
    batch = objective.batch(range(5), 0)
    assert batch.pairs is None
    assert "token_type_ids" not in batch.inputs
    tokens = original(objective.example(4, 0))
    assert tokens.tolist() == [BOS, *objective.segments[4], EOS]


def test_places_are_rows_of_the_batch(objective):
    batch = objective.batch([4, 9, 2], 1)
    packed = batch.inputs["input_ids"][batch.inputs["attention_mask"]]
    packed[batch.places] = batch.labels
    expected = np.concatenate([original(objective.example(i, 1)) for i in (4, 9, 2)])
    np.testing.assert_array_equal(packed.numpy(), expected)
    assert batch.shares.sum() == 1


def test_documents_without_a_pair_are_counted(tokenizer):
    documents = [["one line"], ["one line here", "and another one"], ["a line"]]
    objective = MaskedLM(texts_of(*documents), tokenizer, max_length=20)
    assert objective.skipped == {"document of one segment": 2}
    assert objective.examples == 1
    with pytest.raises(InputError, match="two segments"):
        MaskedLM(texts_of(["a line"]), tokenizer, max_length=20)
    with pytest.raises(InputError, match="fraction"):
        MaskedLM(texts_of(["a line"]), tokenizer, max_length=20, fraction=1.0)
