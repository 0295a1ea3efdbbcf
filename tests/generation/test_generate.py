"""Greedy, sampled and beam-searched tokens: transformers' own, alone and in any batch."""

import pytest
import torch
import transformers

import warpformer as wf
from tests.models.checkpoints import DECODERS, SEQ2SEQ
from warpformer.generation.sampling import Sampler, filtered

from .models import EOS, NEW, PADDING, expected, make, prompts

each = pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
OPTIONS = {"max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": PADDING}
SAMPLED = OPTIONS | {"do_sample": True, "top_k": 40, "top_p": 0.9, "temperature": 1.3}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Which is fastest for models so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("checkpoint"))
        return made[name]

    return get


def new_tokens(model, ids, mask, **options):
    """[B, new], behind the prompt."""
    found = wf.generate(model, ids, mask, **OPTIONS | options)
    if hasattr(model, "encode"):
        return found[:, 1:]
    assert torch.equal(found[:, : ids.shape[1]], ids)
    return found[:, ids.shape[1] :]


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
    assert len(lengths) > 1


def test_ids_of_the_config_are_the_default(models):
    model, theirs = models("marian")
    ids, mask = prompts("marian")
    found = model.generate(ids, mask, max_new_tokens=5)
    assert (found[:, 0] == theirs.config.decoder_start_token_id).all()
    assert wf.generation.config.of_model(models("llama")[0], "eos_token_id") == 2


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.6}, {"temperature": 1.7, "top_k": 30, "top_p": 0.8}],
    ids=str,
)
def test_filters_are_those_of_transformers(options):
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, 97)
    theirs = logits
    for name, value in options.items():
        warper = {"temperature": "Temperature", "top_k": "TopK", "top_p": "TopP"}[name]
        theirs = getattr(transformers, f"{warper}LogitsWarper")(value)(None, theirs)
    found = filtered(logits, wf.GenerationConfig(do_sample=True, **options))
    assert torch.equal(found, theirs)


def test_draws_follow_the_distribution():
    """Chi-square of 20,000 draws, below its 0.999 quantile for 4 degrees of freedom."""
    logits = torch.tensor([0.5, -1.0, 2.0, 1.0, -torch.inf, 0.0])
    count = 20_000
    draw = Sampler(wf.GenerationConfig(do_sample=True), [*range(count)])
    found = draw(logits.expand(count, -1)).bincount(minlength=6)
    expected = logits.softmax(0) * count
    assert found[4] == 0
    there = expected > 0
    assert ((found - expected)[there] ** 2 / expected[there]).sum() < 18.5


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"do_sample": True, "temperature": -1.0}, "temperature = -1.0"),
        ({"do_sample": True, "top_p": 0.0}, "top_p = 0.0"),
        ({"do_sample": True, "top_p": 2.0}, "top_p = 2.0"),
        ({"do_sample": True, "top_k": 0}, "top_k = 0"),
        ({"top_k": 3}, "top_k = 3 counts with do_sample=True alone"),
        ({"length_penalty": 2.0}, "length_penalty = 2.0 counts with num_beams > 1 alone"),
        ({"num_beams": 2, "do_sample": True}, "exclude each other"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping = 'soon'"),
        ({"num_beams": 60}, "num_beams = 60 are too many"),
        ({"eos_token_id": 97}, "eos_token_id = 97 is not in the vocabulary of 97"),
        ({"eos_token_id": -1}, "eos_token_id = -1"),
        ({"do_sample": True, "seed": [1]}, "there are 1 seeds of 3 rows"),
        ({"num_beams": 2, "streamer": Streamer()}, "a streamer cannot follow"),
    ],
    ids=str,
)
def test_bad_options(models, options, message):
    ids, mask = prompts("llama")
    with pytest.raises(wf.InputError, match=message):
        wf.generate(models("llama")[0], ids, mask, **options)


def test_bad_prompts(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
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
    t5 = models("t5")[0]
    t5.config.decoder_start_token_id, kept = None, t5.config.decoder_start_token_id
    t5.config.source.pop("decoder_start_token_id")
    with pytest.raises(wf.InputError, match="decoder_start_token_id"):
        wf.generate(t5, ids)
    t5.config.decoder_start_token_id = kept
