"""Greedy, sampled and beam-searched tokens: transformers' own, alone and in any batch."""

import pytest
import torch

import warpformer as wf
from tests.models.checkpoints import DECODERS, SEQ2SEQ

from .models import NEW, OPTIONS, PADDING, expected, make, new_tokens, prompts

each = pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
SAMPLED = {"do_sample": True, "top_k": 40, "top_p": 0.9, "temperature": 1.3}


@each
def test_greedy_tokens_are_those_of_transformers(models, name):
    model, theirs = models(name)
    ids, mask = prompts(name)
    assert torch.equal(new_tokens(model, ids, mask), expected(theirs, ids, mask))


@each
def test_beams_are_those_of_transformers(models, name):
    model, theirs = models(name)
    ids, mask = prompts(name)
    options = {"num_beams": 3}
    assert torch.equal(new_tokens(model, ids, mask, **options), expected(theirs, ids, mask, **options))


@pytest.mark.parametrize("name", ["gpt2", "marian"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 2, "length_penalty": 0.6, "early_stopping": "never"},
        {"num_beams": 2, "length_penalty": -1.0},
        {"num_beams": 5, "eos_token_id": 5, "max_new_tokens": 6},
    ],
    ids=str,
)
def test_options_of_beams(models, name, options):
    model, theirs = models(name)
    ids, mask = prompts(name)
    assert torch.equal(new_tokens(model, ids, mask, **options), expected(theirs, ids, mask, **options))


@pytest.mark.parametrize("name", ["llama", "deepseek-v2", "t5", "marian"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, SAMPLED], ids=["greedy", "beams", "sampled"])
def test_a_row_gives_the_same_tokens_alone_and_in_a_batch(models, name, options):
    model, _ = models(name)
    ids, mask = prompts(name)
    together = new_tokens(model, ids, mask, **options, **{"seed": [3, 4, 5]} if "top_k" in options else {})
    for row, kept in enumerate(mask.bool()):
        seed = {"seed": 3 + row} if "top_k" in options else {}
        alone = new_tokens(model, ids[row, kept][None], None, **options, **seed)[0]
        assert torch.equal(alone, together[row, : len(alone)])
        assert (together[row, len(alone) :] == PADDING).all()


def test_rows_end_before_others(models):
    """Without which the tests above would show less."""
    ids, mask = prompts("llama")
    lengths = {(row != PADDING).sum().item() for row in new_tokens(models("llama")[0], ids, mask)}
    assert len(lengths) == 2
    assert max(lengths) < NEW


def test_ids_of_the_config_are_the_default(models):
    model, theirs = models("marian")
    ids, mask = prompts("marian")
    found = model.generate(ids, mask, max_new_tokens=5)
    assert (found[:, 0] == theirs.config.decoder_start_token_id).all()
    assert wf.generation.defaults.of_model(models("llama")[0], "eos_token_id") == 2


def test_a_seed_gives_the_same_again(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    found = [new_tokens(model, ids, mask, **SAMPLED, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    torch.manual_seed(7)
    first = new_tokens(model, ids, mask, **SAMPLED)
    torch.manual_seed(7)
    assert torch.equal(new_tokens(model, ids, mask, **SAMPLED), first)


class Streamer:
    def __init__(self):
        self.values = []

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.values.append(None)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_streamer_gets_what_generate_returns(models, name):
    model, (ids, mask) = models(name)[0], prompts(name)
    streamer = Streamer()
    found = wf.generate(model, ids, mask, streamer=streamer, **OPTIONS)
    prompt, *columns, end = streamer.values
    assert end is None
    assert torch.equal(torch.cat([prompt, torch.stack(columns, 1)], 1), found)


def test_a_model_of_ones_own():
    """The protocol, and nothing else."""

    class Next(torch.nn.Module):
        """The token after t is t + 1."""

        def make_cache(self):
            return self

        def reorder_(self, index):
            pass

        def forward(self, input_ids, attention_mask=None, *, cache, logits_to_keep):
            return torch.nn.functional.one_hot(input_ids[:, -logits_to_keep:] + 1, 10)

    found = wf.generate(Next(), torch.tensor([[1, 2], [4, 5]]), max_new_tokens=5, eos_token_id=8)
    assert found.tolist() == [[1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 8, 8]]


def test_bad_prompts(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    with pytest.raises(wf.InputError, match="a streamer cannot follow"):
        wf.generate(model, ids, mask, num_beams=2, streamer=Streamer())
    with pytest.raises(TypeError, match="'beams' is none of"):
        wf.generate(model, ids, beams=3)
    with pytest.raises(wf.InputError, match="prompts of rows \\[2\\] are empty"):
        wf.generate(model, ids, mask * torch.tensor([[1], [1], [0]]))
    with pytest.raises(wf.InputError, match="is not \\[B, T\\]"):
        wf.generate(model, ids[:, :0])
    with pytest.raises(wf.InputError, match="attention_mask"):
        wf.generate(model, ids, mask[:2])
    with pytest.raises(wf.InputError):
        wf.generate(model, ids + 97)
    with pytest.raises(wf.InputError, match=r"input_ids has \[100\], and the vocabulary tokens from 0 to 96"):
        wf.generate(model, torch.tensor([[5, 100]]))
    with pytest.raises(wf.InputError, match="input_ids has 65 tokens, and the model reads 64"):
        wf.generate(model, torch.full((1, 65), 5))
    with pytest.raises(wf.InputError, match=r"max_length = 9 has no room behind prompts of \[15, 10\]"):
        wf.generate(model, ids, mask, max_length=9)
    with pytest.raises(wf.InputError, match="decoder_input_ids are of encoder-decoder models"):
        wf.generate(model, ids, decoder_input_ids=ids)


def test_bad_prompts_of_decoders(models):
    model, (ids, mask) = models("bart")[0], prompts("bart")
    for prefix, message in (
        (torch.tensor([[4]]), r"decoder_input_ids = \[1, 1\] is not \[3, P\]"),
        (torch.tensor([[2, 4], [4, 5], [4, 5]]), "begin with 2 in some rows and in others not"),
        (torch.tensor([[97], [4], [5]]), r"decoder_input_ids has \[97\]"),
    ):
        with pytest.raises(wf.InputError, match=message):
            wf.generate(model, ids, mask, decoder_input_ids=prefix)


def test_a_decoder_needs_a_start(tmp_path):
    model, (ids, mask) = make("t5", tmp_path)[0], prompts("t5")
    model.config.decoder_start_token_id, model.generation_config = None, {}
    del model.config.source["decoder_start_token_id"]
    with pytest.raises(wf.InputError, match="decoder_start_token_id"):
        wf.generate(model, ids, mask)


def test_rows_end_where_the_model_does(models):
    """GPT-2 has 64 positions, and the token behind the last is not read."""
    model = models("gpt2")[0]
    assert wf.generate(model, torch.full((1, 60), 5), max_new_tokens=30, eos_token_id=None).shape == (1, 65)
    assert wf.generate(model, torch.full((2, 50), 5), eos_token_id=None, num_beams=2).shape == (2, 65)
