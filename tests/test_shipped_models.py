"""The models that come with the package: they load, are small, and write the same text every time."""

from pathlib import Path

import pytest
import torch

import warpformer as wf
from warpformer.checkpoint import default_model, open_tokenizer, read_json
from warpformer.nn import PackedLinear
from warpformer.nn.quantized_linear import QuantizedLinear
from warpformer.scoring import perplexity
from warpformer.training import Seq2Seq, Texts, mean_loss, read_texts

TEST = Path(__file__).parents[1] / "examples/data/bible.en-es.test.tsv"
VERSES = slice(200, 260)


def texts(*columns):
    whole = read_texts(TEST, columns)
    rows = whole.rows[VERSES]
    return Texts(whole.path, rows, [range(len(rows))])


def dequantized(name):
    """The model in float32, with the weights that its integers stand for."""
    model = wf.load(default_model(name), dtype=torch.float32)
    for path, layer in [*model.named_modules()]:
        if isinstance(layer, QuantizedLinear):
            dense = PackedLinear.of(layer.weight, layer.bias, parts=layer.parts, gated=layer.gated)
            model.set_submodule(path, dense)
    return model


@pytest.mark.parametrize(("name", "megabytes"), [("translator", 12), ("language_model", 6)])
def test_size(name, megabytes):
    folder = default_model(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= megabytes * 1e6
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "train.json",
    }
    assert read_json(folder / "train.json")["result"]["progress"]["best_loss"] > 0


def test_translations(device):
    translator = wf.Translator(default_model("translator"), device=device)
    english = [
        "In the beginning God created the heaven and the earth.",
        "The woman gave him bread and water.",
    ]
    together = translator.translate(english)
    assert together == [translator.translate(text) for text in english]
    assert together == ["En el principio crió Dios los cielos y la tierra.", "Y la mujer le dió pan y agua."]


def test_text(device, run):
    def text(*options):
        return run("generate", "--prompt", "And it came to pass", "--max-new-tokens", 14, *options)[1]

    greedy = "And it came to pass, and it was so.\nWhen the Jews heard it, they\n"
    assert [text("--temperature", 0) for _ in range(2)] == [greedy, greedy]
    drawn = [text("--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def translation_loss(model, folder):
    return mean_loss(model, Seq2Seq(texts(1, 2), open_tokenizer(folder), max_length=256))


def language_model_loss(model, folder):
    return perplexity(model, open_tokenizer(folder), texts(1)).perplexity


@pytest.mark.parametrize(
    ("name", "loss", "int4_limit"),
    [("translator", translation_loss, 0.03), ("language_model", language_model_loss, 0.04)],
)
def test_bits_cost_little(name, loss, int4_limit):
    folder = default_model(name)
    exact = loss(dequantized(name), folder)
    for options, limit in (({"mode": "int8"}, 0.003), ({"mode": "int4", "group_size": 32}, int4_limit)):
        model = dequantized(name)
        wf.quantize_(model, **options, clip="mse")
        assert loss(model, folder) == pytest.approx(exact, rel=limit)


def test_int8_cache():
    """Which takes little more than half the memory of one in bfloat16."""
    folder = default_model("language_model")
    model, tokenizer = wf.load(folder, dtype=torch.float32), open_tokenizer(folder)
    exact, found = (
        perplexity(model, tokenizer, texts(1), int8_cache=int8_cache).perplexity
        for int8_cache in (False, True)
    )
    assert exact != found
    assert found == pytest.approx(exact, rel=1e-3)
    model, held = wf.load(folder, dtype=torch.bfloat16), []
    for dtype in (None, torch.int8):
        cache = model.make_cache(dtype=dtype)
        with torch.no_grad():
            model(torch.arange(100)[None], cache=cache)
        held.append(cache.memory().held)
    assert held[1] <= 0.53 * held[0]
