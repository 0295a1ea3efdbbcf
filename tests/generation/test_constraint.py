"""Texts follow their grammar, however tokens are chosen."""

import json
import re
import sys

import pytest
import torch

import warpformer as wf
from tests.generation.text import make_tokenizer, save_language_model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Adam", "Eve", "żółć"]},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "text": {"type": "string", "maxLength": 6},
    },
    "required": ["name", "ages", "text"],
    "additionalProperties": False,
}
PATTERN = r"(God|heaven)( and [a-z]{2,5}){1,3}\."
LARK = 'start: "(" start ")" | /[01]{2}/'
EOS, NEW = 2, 250


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return wf.load(save_language_model(tmp_path_factory.mktemp("language_model")))


@pytest.fixture(scope="module")
def constraints(tokenizer):
    return {
        "schema": wf.Constraint.json_schema(SCHEMA, tokenizer),
        "regex": wf.Constraint.regex(PATTERN, tokenizer),
        "lark": wf.Constraint.lark(LARK, tokenizer),
    }


def check(name, text):
    if name == "schema":
        found = json.loads(text)
        assert set(found) == {"name", "ages", "text"}
        assert found["name"] in SCHEMA["properties"]["name"]["enum"]
        assert len(found["ages"]) <= 3
        assert all(type(age) is int and 0 <= age <= 99 for age in found["ages"])
        assert len(found["text"]) <= 6
    elif name == "regex":
        assert re.fullmatch(PATTERN, text)
    else:
        assert re.fullmatch(r"(\(*)[01]{2}(\)*)", text)
        assert text.count("(") == text.count(")")


MODES = {
    "greedy": {"repetition_penalty": 3.0},
    "drawn": {"do_sample": True, "temperature": 1.5, "seed": 5, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "repetition_penalty": 2.0},
    "drafts": {"prompt_lookup_num_tokens": 4, "repetition_penalty": 3.0},
}


def texts(model, tokenizer, ids, mask=None, **options):
    """New texts that have ended."""
    found = wf.generate(model, ids, mask, eos_token_id=EOS, pad_token_id=0, max_new_tokens=NEW, **options)
    rows = found[:, ids.shape[1] :].tolist()
    return [tokenizer.decode(row) for row in rows if EOS in row]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["schema", "regex", "lark"])
def test_texts_follow_it(model, tokenizer, constraints, name, mode):
    prompts = torch.randint(5, 250, (3, 6))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    found = texts(model, tokenizer, prompts, mask, constraint=constraints[name], **MODES[mode])
    assert found
    for text in found:
        check(name, text)


def test_a_row_is_the_same_alone(model, tokenizer, constraints):
    prompts = torch.randint(5, 250, (3, 6))
    options = dict(constraint=constraints["schema"], do_sample=True, temperature=1.3)
    together = wf.generate(model, prompts, eos_token_id=EOS, max_new_tokens=60, seed=[7, 8, 9], **options)
    for row, seed in enumerate((7, 8, 9)):
        alone = wf.generate(
            model, prompts[row : row + 1], eos_token_id=EOS, max_new_tokens=60, seed=seed, **options
        )
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


def test_engine(model, tokenizer, constraints):
    with wf.Engine(model) as engine:
        options = dict(eos_token_id=EOS, max_new_tokens=NEW, do_sample=True, temperature=1.5)
        asked = [
            (name, seed, engine.submit([7, 8], constraint=constraints[name], seed=seed, **options))
            for name in constraints
            for seed in range(4)
        ]
        for name, seed, request in asked:
            tokens, reason = request.result(60)
            expected = wf.generate(
                model, torch.tensor([[7, 8]]), constraint=constraints[name], seed=seed, **options
            )
            assert tokens == expected[0, 2:].tolist()
            if reason == "stop":
                check(name, tokenizer.decode(tokens))


def test_states_are_forgotten(model, tokenizer, monkeypatch):
    from warpformer.generation import constraint

    monkeypatch.setattr(constraint, "STATES", 2)
    (text,) = texts(
        model, tokenizer, torch.tensor([[7, 8]]), constraint=wf.Constraint.regex("[ab]{3,9}", tokenizer)
    )
    assert re.fullmatch("[ab]{3,9}", text)


def test_command(run, tmp_path):
    folder = save_language_model(tmp_path)
    (tmp_path / "schema").write_text('{"enum": ["heaven", "earth"]}')
    options = ["--model", folder, "--prompt", "In the", "--json", "--json-schema", tmp_path / "schema"]
    status, out, _ = run("generate", *options)
    assert status == 0
    assert json.loads(json.loads(out)["text"]) in ("heaven", "earth")


def test_bad_input(model, tokenizer, constraints, monkeypatch):
    with pytest.raises(wf.InputError, match="the schema is not JSON"):
        wf.Constraint.json_schema("{", tokenizer)
    with pytest.raises(wf.InputError, match=r"the grammar cannot be read: .*nothing"):
        wf.Constraint.json_schema({"type": "nothing"}, tokenizer)
    with pytest.raises(wf.InputError, match=r"(?s)the grammar cannot be read: .*unclosed group"):
        wf.Constraint.regex("a(", tokenizer)
    with pytest.raises(wf.InputError, match="is longer than"):
        wf.Constraint.lark("#" * (2 << 20), tokenizer)
    with pytest.raises(wf.InputError, match="a constraint needs an eos_token_id"):
        wf.generate(model, torch.tensor([[7]]), constraint=constraints["lark"], eos_token_id=None)
    with pytest.raises(wf.InputError, match=r"no token|no finite score"):
        wf.generate(
            model, torch.tensor([[7]]), constraint=constraints["lark"], suppress_tokens=[*range(3, 290)]
        )
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ModuleNotFoundError, match=r"warpformer\[constraints\]"):
        wf.Constraint.regex("a", tokenizer)
