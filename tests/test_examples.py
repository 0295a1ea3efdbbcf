"""The examples, on small data: each runs to its end and prints its figures."""

import importlib
import re
import runpy
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.check import threads
from warpformer.training import run as training

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process, which has its imports: what it prints."""

    def run(name, *arguments, status=0):
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        # On one thread: two that share a busy core wait for each other, at these sizes most of the time.
        with threads(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of a script are nobody's here
            try:
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
                found = 0
            except SystemExit as stop:
                found = stop.code or 0
        assert found == status
        return capsys.readouterr().out

    return run


def columns(output, row):
    """The numbers of a row of the table that an example prints."""
    return [float(number) for number in re.search(rf"^{row} (.*)", output, re.M)[1].replace("%", "").split()]


def test_torch_layers(run):
    output = run("torch_layers.py", "--steps", "30", "--width", "64", "--layers", "2")
    ours, theirs = (columns(output, name)[:3] for name in ("warpformer", "torch"))  # losses and accuracy
    assert ours == pytest.approx(theirs, abs=0.01)
    assert ours[1] < ours[0]
    assert ours[2] > 90


def test_hugging_face(run):
    output = run("hugging_face.py", "--width", "128", "--layers", "2", "--prompt", "32", "--new-tokens", "4")
    assert columns(output, "patched")[0] < 1e-4
    assert columns(output, "patched")[1] == 100
    assert 1e-4 < columns(output, "int8")[0] < 0.1


def test_classify(run):
    output = run("classify.py", "--small")
    assert columns(output, "the majority")[-1] < columns(output, "all-MiniLM, fine-tuned")[-1]


TEST = EXAMPLES / "data/bible.en-es.test.tsv"
SMALL = dict(
    llama=dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2),
    transformer=dict(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=256,
    ),
)  # fmt: skip


def trained(recipe, folder):
    """What a recipe makes in a few steps, in a model that is smaller."""
    config = training.read_run_config(EXAMPLES / recipe)
    config.out = str(folder)
    kind = config.model["model_type"]
    sizes = SMALL[kind] | ({"tie_word_embeddings": True} if kind == "llama" else {})
    config.model = {"model_type": kind, "architectures": config.model["architectures"]} | sizes
    config.data.train = config.data.valid
    config.tokenizer.vocab_size = 500
    config.train.max_steps, config.train.warmup_steps = 3, 1
    training.train(config)
    return folder


def slice_of_test(folder, verses):
    path = folder / "test.tsv"
    path.write_text("".join(TEST.read_text().splitlines(keepends=True)[:verses]))
    return path


def test_evaluate_a_language_model(run, tmp_path):
    model = trained("language_model/cpu.toml", tmp_path / "model")
    output = run("language_model/evaluate.py", model, slice_of_test(tmp_path, 20), "--window", "64")
    rows = [cells(output, name) for name in ("float32", "bfloat16", "int8", "int4, group 32")]
    losses = [float(row[0]) for row in rows]
    assert 100 < losses[0] < 600
    assert losses == pytest.approx([losses[0]] * 4, rel=0.02)
    assert "trained for 0 minutes" in output


def test_evaluate_a_translator(run, tmp_path):
    model = trained("translate/cpu.toml", tmp_path / "model")
    output = run("translate/evaluate.py", model, slice_of_test(tmp_path, 4), "--beams", "1")
    losses = [float(cells(output, name)[0]) for name in ("float32", "int8", "int4, group 32")]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.02)
    assert re.search(r"^BLEU: nrefs:1.*version:", output, re.M)
    assert "paired bootstrap of 1000 samples, int8 and float32: p = " in output


def cells(output, row):
    """Those of a row of the first table that has it."""
    return re.search(rf"^\| {re.escape(row)} \| (.*) \|$", output, re.M)[1].split(" | ")


@pytest.mark.parametrize(
    ("objective", "answer"),
    {
        "causal": r"^The cat \.\.\.  The cat.*^log p\(The cat sat on the table\.\) = -\d",
        "mlm-nsp": r"^next sentence .*% right$.*^ +\d.*%  The cat.* on the table\.$",
        "denoising": r"^hidden tokens .*^The cat <mask> on the table\.  ->",
        "span-corruption": r"^hidden tokens .*^The cat <extra_id_0> on the table\.  ->",
    }.items(),
    ids=["causal", "mlm-nsp", "denoising", "span-corruption"],
)
def test_pretrain(run, objective, answer, tmp_path):
    arguments = ("--objective", objective, "--small", "--out", tmp_path)
    output = run("pretrain.py", *arguments, status=1)  # the bar is for the whole run
    assert "not learned: a loss is not below its bar" in output
    tokens, loss, unigram, other, bar = columns(output, "all targets")
    assert tokens > 4000
    assert bar < loss < unigram + 1 < 8  # as good as untrained are 4096 equal chances: 8.3
    assert bar == pytest.approx(other if objective == "causal" else unigram - 1, abs=0.0011)
    assert other < unigram
    assert re.search(answer, output, re.M | re.S)


@pytest.fixture
def ngrams(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("ngrams")


SIZE = 7  # of a vocabulary: nothing follows 5 and 6, 6 follows nothing
TEXT = np.append(np.random.default_rng(0).choice(5, 60, p=[0.4, 0.3, 0.15, 0.1, 0.05]), 5)
BEFORE, TOKENS = TEXT[:-1], TEXT[1:]


def test_kneser_ney_sums_to_one(ngrams):
    model = ngrams.KneserNeyBigram(BEFORE, TOKENS, SIZE)
    every = np.arange(SIZE)
    for before in every:
        probabilities = model.probabilities(np.full(SIZE, before), every)
        assert probabilities.sum() == pytest.approx(1, abs=1e-12)
        assert probabilities.min() > 0
    assert np.exp(-ngrams.Unigram(TOKENS, SIZE).losses(every)).sum() == pytest.approx(1, abs=1e-12)


def test_kneser_ney_is_its_formula(ngrams):
    pairs = Counter(zip(BEFORE.tolist(), TOKENS.tolist(), strict=True))

    def discounted(counts):
        once, twice = (sum(count == n for count in counts) for n in (1, 2))
        return once / (once + 2 * twice)

    followers = [sum(w == token for _, w in pairs) for token in range(SIZE)]
    lower, upper = discounted(followers), discounted(pairs.values())

    def q(w):
        words = sum(count > 0 for count in followers)
        return (max(followers[w] - lower, 0) + lower * words / SIZE) / len(pairs)

    def p(w, v):
        total = sum(count for pair, count in pairs.items() if pair[0] == v)
        if not total:
            return q(w)
        kinds = sum(pair[0] == v for pair in pairs)
        return (max(pairs[v, w] - upper, 0) + upper * kinds * q(w)) / total

    model = ngrams.KneserNeyBigram(BEFORE, TOKENS, SIZE)
    before, tokens = (grid.flatten() for grid in np.meshgrid(range(SIZE), range(SIZE)))
    expected = [-np.log(p(w, v)) for v, w in zip(before.tolist(), tokens.tolist(), strict=True)]
    np.testing.assert_allclose(model.losses(before, tokens), expected, rtol=1e-12)


def test_entropy(ngrams):
    assert ngrams.entropy(np.array([3, 3, 8, 9])) == pytest.approx(1.5 * np.log(2))
