"""What a checkpoint says of how to generate, and what contradicts itself."""

import json

import pytest
import torch
import transformers

import warpformer as wf
from tests.models.checkpoints import SEQ2SEQ, random_model
from warpformer.generation.defaults import config_for

from .models import make, prompts

SUMMARIZER = {  # as that of bart-large-cnn
    "num_beams": 4,
    "length_penalty": 2.0,
    "early_stopping": True,
    "no_repeat_ngram_size": 3,
    "min_length": 6,
    "max_length": 14,
    "forced_bos_token_id": 9,
}


@pytest.fixture
def bart(tmp_path):
    """(ours, transformers') with these defaults."""
    _, theirs = make("bart", tmp_path)
    for name, value in SUMMARIZER.items():
        setattr(theirs.generation_config, name, value)
    theirs.save_pretrained(tmp_path)
    return wf.load(tmp_path), theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 1},
        {"max_new_tokens": 5},
        {"forced_bos_token_id": None},
        {"max_length": 9, "min_length": 0},
    ],
    ids=str,
)
def test_generation_config_has_the_defaults(bart, options):
    (model, theirs), (ids, _) = bart, prompts("bart")
    found = model.generate(ids[:1], **options)
    assert torch.equal(found, theirs.generate(ids[:1], **options))


def test_it_is_saved(bart, tmp_path):
    model, _ = bart
    wf.save(model, tmp_path / "copy")
    again = wf.load(tmp_path / "copy")
    assert again.generation_config == model.generation_config
    assert again.generation_config["no_repeat_ngram_size"] == 3


@pytest.mark.parametrize(("name", "bad_words"), [("marian", [[96]]), ("mbart", None)])
def test_files_of_translators(tmp_path, name, bad_words):
    """Marian never writes the padding that its decoder starts with; mBART is told the language."""
    _, theirs = make(name, tmp_path)
    ids, _ = prompts(name)
    theirs.generation_config.bad_words_ids = bad_words
    theirs.generation_config.renormalize_logits = True
    theirs.generation_config.num_beams = 3
    theirs.generation_config.max_length = 20
    theirs.save_pretrained(tmp_path)
    language = {} if bad_words else {"forced_bos_token_id": 12}
    found = wf.load(tmp_path).generate(ids[:1], **language)
    assert torch.equal(found, theirs.generate(ids[:1], **language))
    assert bad_words or found[0, 1] == 12
    assert found.shape[1] <= 20


def test_older_checkpoints_have_them_in_config(tmp_path):
    _, config = SEQ2SEQ["bart"]
    theirs = random_model(transformers.BartForConditionalGeneration, config)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_beams": 2, "max_length": 8, "top_k": 50}))
    config = config_for(wf.load(tmp_path), {})
    assert (config.num_beams, config.max_length, config.top_k) == (2, 8, None)
    assert config.eos_token_id == 2


@pytest.mark.parametrize(
    ("defaults", "options", "found"),
    [
        ({"do_sample": True, "top_p": 0.9}, {}, {"do_sample": True, "top_p": 0.9}),
        ({"do_sample": True, "top_p": 0.9}, {"do_sample": False}, {"top_p": None}),
        ({"do_sample": True, "top_p": 0.9}, {"num_beams": 2}, {"do_sample": False, "top_p": None}),
        (
            {"num_beams": 4, "length_penalty": 2.0},
            {"do_sample": True},
            {"num_beams": 1, "length_penalty": 1.0},
        ),
        ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 2}, {"length_penalty": 2.0}),
        ({"max_length": 20}, {"max_new_tokens": 4}, {"max_length": None}),
        ({"max_new_tokens": 20}, {"max_length": 4}, {"max_new_tokens": None}),
        ({"min_length": 20}, {"max_length": 4}, {"min_length": 0}),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": None}, {"temperature": 1.0}),
        ({"eos_token_id": [3, 4]}, {}, {"eos_token_id": [3, 4]}),
        ({"pad_token_id": -1}, {}, {"pad_token_id": None}),
        ({"eos_token_id": [3, 4]}, {"eos_token_id": None}, {"eos_token_id": None}),
    ],
)
def test_options_come_first(models, defaults, options, found, monkeypatch):
    model = models("llama")[0]
    monkeypatch.setattr(model, "generation_config", defaults)
    config = config_for(model, options)
    assert {name: getattr(config, name) for name in found} == found


def test_what_has_no_effect_is_named(tmp_path, caplog):
    make("gpt2", tmp_path)
    (tmp_path / "generation_config.json").write_text(
        '{"guidance_scale": 1.5, "epsilon_cutoff": 0.0, "top_k": 50}'
    )
    model = wf.load(tmp_path)
    assert [record.getMessage() for record in caplog.records if "effect" in record.getMessage()] == [
        "generation_config.json: guidance_scale = 1.5 has no effect"
    ]
    assert config_for(model, {}).top_k is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0 is not None or 1, 2"),
        ({"max_length": "9"}, "max_length = '9'"),
        ({"max_new_tokens": 5, "max_length": 5}, "max_new_tokens and max_length exclude each other"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens = 6 is over max_new_tokens = 5"),
        ({"max_length": 50, "min_length": 60}, "min_length = 60 is over max_length = 50"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1 is not 0, 1, 2"),
        ({"do_sample": True, "temperature": -1.0}, "temperature = -1.0 is not a number above 0"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature = nan"),
        ({"do_sample": True, "temperature": "hot"}, "temperature = 'hot'"),
        ({"do_sample": True, "top_p": 0.0}, "top_p = 0.0 is not above 0 and at most 1"),
        ({"do_sample": True, "top_p": 2.0}, "top_p = 2.0"),
        ({"do_sample": True, "typical_p": 1.1}, "typical_p = 1.1"),
        ({"do_sample": True, "min_p": -0.1}, "min_p = -0.1 is not a number from 0 to 1"),
        ({"do_sample": True, "top_k": -1}, "top_k = -1"),
        ({"do_sample": 1}, "do_sample = 1 is not True or False"),
        ({"top_k": 3}, "top_k = 3 counts with do_sample=True alone"),
        ({"min_p": 0.1}, "min_p = 0.1 counts with do_sample=True alone"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty = inf"),
        ({"bad_words_ids": [5]}, "bad_words_ids = \\[5\\] is not a list of lists"),
        ({"bad_words_ids": [[5], []]}, "none of them empty"),
        ({"bad_words_ids": [[5, 97]]}, "bad_words_ids = 97 is not in the vocabulary of 97"),
        ({"suppress_tokens": [-3]}, "suppress_tokens = \\[-3\\] is not of tokens"),
        ({"forced_eos_token_id": 5, "suppress_tokens": [4, 5]}, "forced_eos_token_id = 5 is among suppress"),
        ({"stop_strings": [""]}, "stop_strings = \\[''\\] is not a text or texts"),
        ({"num_beams": 2, "do_sample": True}, "do_sample and num_beams > 1 exclude each other"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping = 'soon'"),
        ({"num_beams": 60}, "num_beams = 60 are too many"),
        ({"num_beams": 2, "patience": 0}, "patience = 0 is not a number above 0"),
        ({"length_penalty": 2.0}, "length_penalty = 2.0 counts with num_beams > 1 alone"),
        (
            {"num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 1.0},
            "is no multiple of num_beam_groups",
        ),
        (
            {"num_beams": 4, "num_beam_groups": 2},
            "diversity_penalty = 0.0 does not go with num_beam_groups = 2",
        ),
        ({"num_beams": 4, "diversity_penalty": 1.0}, "does not go with num_beam_groups = 1"),
        ({"num_return_sequences": 2}, "num_return_sequences = 2 is over 1"),
        ({"num_beams": 3, "num_return_sequences": 4}, "num_return_sequences = 4 is over 3"),
        ({"eos_token_id": 97}, "eos_token_id = 97 is not in the vocabulary of 97"),
        ({"eos_token_id": -1}, "eos_token_id = -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>'"),
        ({"do_sample": True, "seed": [1]}, "there are 1 seeds of 3 rows"),
        ({"do_sample": True, "seed": 0.5}, "seed = 0.5 is not an integer"),
    ],
    ids=str,
)
def test_bad_options(models, options, message):
    ids, mask = prompts("llama")
    known = {"max_new_tokens": 14, "pad_token_id": 0} if "max_length" not in options else {}
    with pytest.raises(wf.InputError, match=message):
        wf.generate(models("llama")[0], ids, mask, **known | options)
