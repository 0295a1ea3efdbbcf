"""Texts in, texts out: the same in any batch and order."""

import pytest
import torch

import warpformer as wf
from tests.generation.text import TEXTS, save_language_model, save_translator

LINES = [*TEXTS, "", "  ", "a </s> b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_translator(tmp_path_factory.mktemp("translator"))


@pytest.fixture(scope="module")
def translator(folder):
    return wf.Translator(folder)


def test_a_text_is_translated_as_generate_does(translator):
    tokenizer = translator.tokenizer
    ids = [*tokenizer.encode(TEXTS[0]).ids, 2]
    found = wf.generate(translator.model, torch.tensor([ids]), num_beams=4, max_new_tokens=20)[0]
    assert found[0] == 1
    text = tokenizer.decode(found.tolist(), skip_special_tokens=True).strip()
    assert translator.translate(TEXTS[0], max_new_tokens=20) == text
    assert text


@pytest.mark.parametrize("options", [{}, {"num_beams": 1}], ids=str)
def test_the_batch_does_not_matter(translator, options):
    alone = [translator.translate(line, max_new_tokens=20, **options) for line in LINES]
    done = []
    for size in (1, 3, 32):
        together = translator.translate(
            LINES, batch_size=size, max_new_tokens=20, progress=done.append, **options
        )
        assert together == alone
    assert sum(done) == 3 * len(LINES)
    assert alone[4:6] == ["", ""]
    assert translator.translate([]) == []


def test_the_best_of_each_text(translator):
    best = translator.translate(LINES, num_return_sequences=3, max_new_tokens=8)
    assert [len(texts) for texts in best] == [3] * len(LINES)
    assert [texts[0] for texts in best] == translator.translate(LINES, max_new_tokens=8)
    assert translator.translate(LINES[0], num_return_sequences=3, max_new_tokens=8) == best[0]
    with pytest.raises(wf.InputError, match="return_dict_in_generate is for generate"):
        translator.translate(LINES, return_dict_in_generate=True)


def test_special_tokens_in_a_text_are_letters(translator):
    assert 2 not in translator.tokenizer.encode("a </s> b").ids


def test_int8(folder):
    translator = wf.Translator(folder, quantization="int8")
    assert type(translator.model.backbone.encoder.layers[0].feed_forward.up) is wf.nn.Int8Linear
    assert len(translator.translate(LINES, max_new_tokens=9)) == len(LINES)


def test_bad_input(translator, tmp_path):
    with pytest.raises(wf.InputError, match="has 101 tokens, and the model reads 64"):
        translator.translate("x" * 100)
    with pytest.raises(TypeError, match="one is int"):
        translator.translate([3])
    with pytest.raises(wf.InputError, match="batch_size = 0"):
        translator.translate(["a"], batch_size=0)
    with pytest.raises(wf.CheckpointError, match="CausalLM is not for conditional generation"):
        wf.Translator(save_language_model(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        wf.Translator(tmp_path)
