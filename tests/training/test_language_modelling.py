"""Causal and sequence-to-sequence examples, and the segments that other objectives take."""

from pathlib import Path

import numpy as np
import pytest

from tests.training.models import make_model
from warpformer import InputError
from warpformer.training import CausalLM, Seq2Seq, Texts
from warpformer.training.objectives.segments import Segments
from warpformer.training.tokenizer import encode

EOS, BOS = 2, 1


def texts_of(*documents):
    rows, ranges = [], []
    for document in documents:
        ranges.append(range(len(rows), len(rows) + len(document)))
        rows += [(line,) for line in document]
    return Texts(Path("texts"), rows, ranges)


def test_causal_labels_are_the_shift(english, tokenizer):
    objective = CausalLM(english, tokenizer, max_length=50)
    examples = [objective.example(index, 0) for index in range(objective.examples)]
    assert all(np.array_equal(e["tokens"][1:], e["labels"][:-1]) for e in examples)
    assert [len(e["tokens"]) for e in examples] == objective.lengths().tolist()
    stream = np.concatenate([e["labels"] for e in examples])
    documents = [[english.rows[row][0] for row in document] for document in english.documents]
    assert tokenizer.decode(stream.tolist()) == "".join("\n".join(lines) for lines in documents)
    assert (stream == EOS).sum() == len(documents)
    assert examples[0]["tokens"][0] == EOS
    assert stream[-1] == EOS


def test_texts_begin_with_what_is_between_documents(tokenizer):
    ids = [CausalLM(texts_of(*documents), tokenizer, max_length=9).token_ids for documents in ("ab", "a")]
    assert [each.get("bos_token_id") for each in ids] == [EOS, None]


@pytest.mark.parametrize("lengths", [(5,), (5, 9), (5, 10), (5, 11)])
def test_causal_blocks_at_every_rest(tokenizer, lengths):
    lines = [" ".join("abcdefghijkl"[:n]) for n in lengths]
    objective = CausalLM(texts_of(lines), tokenizer, max_length=5)
    stream = np.concatenate([objective.example(i, 0)["labels"] for i in range(objective.examples)])
    assert tokenizer.decode(stream.tolist()) == "\n".join(lines)


def test_seq2seq_teacher_forcing(pairs, tokenizer):
    objective = Seq2Seq(pairs, tokenizer, max_length=100)
    index = 7
    source, target = (encode(tokenizer, [pairs.rows[objective.rows[index]][side]])[0] for side in (0, 1))
    batch = objective.batch([index], 0)
    assert batch.inputs["input_ids"][0].tolist() == [*source, EOS]
    assert batch.inputs["decoder_input_ids"][0].tolist() == [BOS, *target]
    assert batch.labels.tolist() == [*target, EOS]
    assert batch.tokens == len(source) + len(target) + 2


def test_pairs_over_the_limit_are_counted(pairs, tokenizer):
    whole, cut = (Seq2Seq(pairs, tokenizer, max_length=length) for length in (10**6, 60))
    assert whole.skipped == {}
    assert whole.examples == len(pairs.rows)
    assert cut.skipped == {"longer than max_length": whole.examples - cut.examples}
    assert 0 < cut.examples < whole.examples
    with pytest.raises(InputError, match="longer than max_length = 1"):
        Seq2Seq(pairs, tokenizer, max_length=1)


def test_token_ids_are_fields_of_the_model(pairs, tokenizer):
    objective = Seq2Seq(pairs, tokenizer, max_length=100)
    config = make_model(objective, tokenizer).config
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, EOS, BOS)


def test_segments_are_whole_lines(english, tokenizer):
    segments = Segments.of(english, tokenizer, 80)
    lengths = segments.tokens.lengths
    assert lengths.max() <= 80
    assert lengths.mean() > 50
    for number, document in enumerate(english.documents):
        chosen = np.flatnonzero(segments.documents == number)
        lines = [english.rows[row][0] for row in document]
        found = [tokenizer.decode(segments.tokens[i].tolist()) for i in chosen]
        assert "\n".join(found).replace("\n", "") == "".join(lines)


def test_a_line_above_the_limit_is_cut(tokenizer):
    line = "a b c d e f g h i j"
    segments = Segments.of(texts_of([line, "k"], ["l"]), tokenizer, 4)
    assert segments.documents.tolist() == [0] * (len(segments.tokens) - 1) + [1]
    whole = "".join(tokenizer.decode(segments.tokens[i].tolist()) for i in range(len(segments.tokens)))
    assert whole.replace("\n", "") == line + "kl"
    with pytest.raises(InputError, match="leaves 1 tokens"):
        Segments.of(texts_of([line]), tokenizer, 1)
