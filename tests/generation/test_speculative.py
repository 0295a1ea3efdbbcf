"""Drafts change the calls of the model, and no token and no probability."""

from copy import deepcopy

import pytest
import torch

import warpformer as wf
from tests.models.checkpoints import SEQ2SEQ
from warpformer.generation.drafts import PromptLookup
from warpformer.generation.history import History
from warpformer.models import llama, phi3

from .models import OPTIONS, PADDING, counted, make, new_tokens, prompts
from .text import make_tokenizer

NAMES = ["llama", "mistral", "gemma2", "gpt2", "deepseek-v2", "mixtral", "t5", "bart", "marian"]
SAMPLED = {"do_sample": True, "top_p": 0.9, "temperature": 0.7, "seed": 3}
MANY = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 4,
    "bad_words_ids": [[40], [74, 40]],
    "min_new_tokens": 5,
    "suppress_tokens": [12, 90],
    "forced_eos_token_id": 5,
}
TWICE = {"num_return_sequences": 2}
LOOKUP = {"prompt_lookup_num_tokens": 4}


def same(model, ids, mask, drafts, **options):
    """What is generated, with as without drafts; and the calls of both."""
    options = OPTIONS | {"return_dict_in_generate": True} | options
    with counted(model) as calls:
        plain = wf.generate(model, ids, mask, **options)
    with counted(model) as fewer:
        found = wf.generate(model, ids, mask, **options, **drafts)
    assert torch.equal(found.sequences, plain.sequences)
    assert torch.equal(found.log_probs, plain.log_probs)
    return found, len(calls), len(fewer)


@pytest.mark.parametrize("options", [{}, SAMPLED, MANY, SAMPLED | MANY | TWICE], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_the_same(models, name, options):
    model, (ids, mask) = models(name)[0], prompts(name)
    ids[:, 9:] = ids[:, 2:8]  # something to look up
    smaller = models("bart" if name == "marian" else "marian" if name in SEQ2SEQ else "qwen2")[0]
    drafts = [LOOKUP, {"prompt_lookup_num_tokens": 9, "max_matching_ngram_size": 1}]
    drafts.append({"assistant_model": smaller, "num_assistant_tokens": 3})
    for each in drafts:
        same(model, ids, mask, each, max_new_tokens=20, **options)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_calls_are_fewer(models, name):
    """A draft model that is the model itself is always right: six tokens a call."""
    model, (ids, mask) = models(name)[0], prompts(name)
    options = {"max_new_tokens": 25, "eos_token_id": None}
    drafts = {"assistant_model": deepcopy(model), "num_assistant_tokens": 5}
    _, calls, fewer = same(model, ids, mask, drafts, **options)
    assert (calls, fewer) == (25, 5)  # 1 + 6 + 6 + 6 + 6
    _, _, fewer = same(model, ids, mask, LOOKUP, **options)
    assert fewer < 25


def test_rows_accept_unequal_numbers(models):
    """Calls have no masks all the same, and rows that are done are in none."""
    model, (ids, mask) = models("llama")[0], prompts("llama")
    with counted(model) as calls:
        wf.generate(model, ids, mask, **OPTIONS, **LOOKUP)
    assert {len(tokens) for tokens, *_ in calls} == {3, 1}
    assert max(tokens.shape[1] for tokens, *_ in calls[1:]) == 5
    assert not any(mask for _, *mask in calls[1:])


def test_a_row_gives_the_same_tokens_alone(models):
    model, (ids, mask) = models("mistral")[0], prompts("mistral")
    options = {"max_new_tokens": 30, **SAMPLED, "seed": [3, 4, 5], **LOOKUP}
    together = new_tokens(model, ids, mask, **options)
    for row, kept in enumerate(mask.bool()):
        alone = new_tokens(model, ids[row, kept][None], None, **options | {"seed": 3 + row})[0]
        assert torch.equal(alone, together[row, : len(alone)])
        assert (together[row, len(alone) :] == PADDING).all()


def test_functions_of_users_see_what_comes_alone(models):
    """Histories of rejected drafts are shown to nobody."""
    model, (ids, _) = models("llama")[0], prompts("llama")

    def watched(drafts):
        seen = []

        def processor(input_ids, scores):
            seen.append(input_ids.tolist())
            return scores.masked_fill(torch.arange(97) % 3 == 0, -torch.inf)

        def criterion(input_ids, scores):
            return (input_ids[:, -5:] == input_ids[:, -5:].roll(1, 1)).all(1)

        functions = {"logits_processor": processor, "stopping_criteria": criterion}
        found = new_tokens(model, ids[:1], None, max_new_tokens=40, **functions, **drafts)
        return seen, found.tolist()

    assert watched(LOOKUP) == watched({})


def test_stop_strings(models):
    model, tokenizer = models("llama")[0], make_tokenizer()
    ids = torch.tensor([[30, 40, 50, 60, 70] * 3])
    free = wf.generate(model, ids, max_new_tokens=20, eos_token_id=None)[0, 15:].tolist()
    stop = tokenizer.decode(free[9:11])
    options = {"stop_strings": stop, "tokenizer": tokenizer, "eos_token_id": None, "max_new_tokens": 20}
    for drafts in (LOOKUP, {"assistant_model": deepcopy(model)}):
        found, _, _ = same(model, ids, None, drafts, **options)
        assert found.sequences.shape[1] <= 15 + 11


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_streamer_gets_columns(models, name):
    class Streamer:
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values.append(value)

        def end(self):
            self.ended = True

    model, (ids, mask) = models(name)[0], prompts(name)
    streamer = Streamer()
    found = wf.generate(model, ids, mask, streamer=streamer, **OPTIONS, **LOOKUP)
    prompt, *columns = streamer.values
    assert streamer.ended
    assert torch.equal(torch.cat([prompt, torch.stack(columns, 1)], 1), found)


def test_rows_end_where_the_models_do(models):
    """GPT-2 reads 64 tokens: drafts do not go beyond, and a draft model that reads fewer ceases to draft."""
    model, ids = models("gpt2")[0], torch.full((2, 50), 5)
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    smaller = deepcopy(model)
    smaller.config.n_positions = 55
    assert smaller.config.max_length == 55
    for drafts in ({"prompt_lookup_num_tokens": 30}, {"assistant_model": smaller}):
        found, calls, fewer = same(model, ids, mask, drafts, max_new_tokens=30, eos_token_id=None)
        assert found.sequences.shape == (2, 80)
        assert fewer < calls
    with pytest.raises(wf.InputError, match="have 60 tokens, and the assistant_model reads 55"):
        wf.generate(model, torch.full((1, 60), 5), assistant_model=smaller)


def test_a_draft_beyond_the_cache_is_not_verified(models):
    model, ids = models("llama")[0], torch.tensor([[5, 6, 7, 8] * 7])
    eos = wf.generate(model, ids, max_new_tokens=4, eos_token_id=None)[0, -1].item()
    options = {"max_new_tokens": 60, "eos_token_id": eos}
    plain = wf.generate(model, ids, **options)
    cache = model.make_cache(max_tokens=32)  # room for 28 + 4
    found = wf.generate(model, ids, cache=cache, prompt_lookup_num_tokens=20, **options)
    assert torch.equal(found, plain)
    with pytest.raises(wf.nn.CacheFull):
        wf.generate(model, ids, cache=cache.fork([]), max_new_tokens=20, eos_token_id=None, **LOOKUP)


@pytest.mark.parametrize("mode", [None, "int8", "int4", "int4_dynamic"])
@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek-v2", "t5"])
def test_logits_of_several_tokens_are_those_of_each(tmp_path, name, mode):
    """Bit for bit, in bfloat16, beside drafts that are taken back: so tokens of these models are the same."""
    make(name, tmp_path)
    model = wf.load(tmp_path, dtype=torch.bfloat16, quantization=mode)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    encoder = {"input_ids": ids[:, :9]} if hasattr(model, "encode") else {}
    key = "decoder_input_ids" if encoder else "input_ids"

    def logits(counts, rejected, cache_dtype):
        cache, found, begin = model.make_cache(dtype=cache_dtype), [], 5
        model(**encoder, **{key: ids[:, :5]}, cache=cache)
        for count in counts:
            tokens = torch.cat([ids[:, begin : begin + count], torch.full((2, rejected), 7)], 1)
            found.append(model(**{key: tokens}, cache=cache)[:, :count])
            cache.rewind_(rejected)
            begin += count
        return torch.cat(found, 1)

    with torch.no_grad():
        for dtype in (None, torch.int8):
            assert torch.equal(logits([1] * 19, 0, dtype), logits([7, 1, 11], 3, dtype))


def test_longrope_is_that_of_single_tokens():
    """Where a call crosses the length beyond which the model has other angles."""
    torch.manual_seed(0)
    factors = dict(short_factor=[1.0] * 6, long_factor=[3.0] * 6, factor=4.0)
    config = phi3.Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_scaling=dict(rope_type="longrope", **factors),
    )
    model = llama.CausalLM(phi3.Model(config), config).eval()
    with torch.no_grad():
        model.backbone.tokens.weight.mul_(20)
    drafts = {"assistant_model": deepcopy(model), "num_assistant_tokens": 7}
    options = {"max_new_tokens": 24, "eos_token_id": None}
    _, calls, fewer = same(model, torch.tensor([[5, 6, 7, 8, 9]]), None, drafts, **options)
    assert (calls, fewer) == (24, 4)


def test_prompt_lookup():
    def draft(rows, count, size):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, 0, "left")
        history = History.of_prompts(ids, (ids != 0).int(), lambda lengths: lengths + 99)
        return PromptLookup(count, size)(history, None).tolist()

    assert draft([[7, 8, 9, 5, 7, 8]], 3, 2) == [[9, 5, 7]]
    assert draft([[7, 8, 9, 5, 7, 8]], 9, 2) == [[9, 5, 7, 8, -1, -1, -1, -1, -1]]
    assert draft([[1, 2, 3]], 2, 2) == [[]]  # nowhere
    assert draft([[4]], 2, 2) == [[]]
    assert draft([[1, 2, 3, 9, 2, 4, 1, 2]], 1, 2) == [[3]]  # of two tokens rather than of one
    assert draft([[1, 2, 3, 9, 2, 4, 1, 2]], 1, 1) == [[4]]  # the last
    assert draft([[1, 2, 3, 9, 2, 4, 1, 2]], 4, 1) == [[3, 9, 2, 4]]  # the last that so many follow
    assert draft([[6, 6, 6, 6]], 2, 2) == [[6, 6]]
    assert draft([[3, 4, 3], [9, 8, 7, 6, 9]], 1, 3) == [[4], [8]]


def test_bad_drafts(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    for options, message in (
        ({"num_beams": 2, **LOOKUP}, "prompt_lookup_num_tokens and num_beams > 1 exclude"),
        ({"num_beams": 2, "assistant_model": model}, "assistant_model and num_beams > 1 exclude"),
        ({"assistant_model": model, **LOOKUP}, "assistant_model and prompt_lookup_num_tokens exclude"),
        ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens = 0 is not None or 1"),
        ({"max_matching_ngram_size": 3}, "max_matching_ngram_size = 3 counts with prompt_lookup_num_tokens"),
        ({"num_assistant_tokens": 3}, "num_assistant_tokens = 3 counts with an assistant_model alone"),
        ({"assistant_model": models("bart")[0]}, "one of model and assistant_model is an encoder-decoder"),
    ):
        with pytest.raises(wf.InputError, match=message):
            wf.generate(model, ids, mask, **options)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    smaller = llama.Config(vocab_size=96, **sizes)
    smaller = llama.CausalLM(llama.Model(smaller), smaller).eval()
    with pytest.raises(wf.InputError, match="vocabulary of assistant_model = 96 is not that of model = 97"):
        wf.generate(model, ids.clamp(max=95), mask, assistant_model=smaller)


def test_options_of_a_checkpoint_give_way(models):
    """And those of a call to none."""
    model, (ids, mask) = models("bart")[0], prompts("bart")
    expected = [wf.generate(model, ids, mask, **OPTIONS, num_beams=beams) for beams in (1, 2)]
    before = model.generation_config
    try:
        model.generation_config = before | {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
        assert torch.equal(wf.generate(model, ids, mask, **OPTIONS, num_beams=2), expected[1])
        model.generation_config = before | {"num_beams": 2, "num_assistant_tokens": 7}
        assert torch.equal(wf.generate(model, ids, mask, **OPTIONS, **LOOKUP), expected[0])
    finally:
        model.generation_config = before


def test_a_model_of_ones_own():
    class Cache:
        def __init__(self):
            self.tokens = torch.zeros(0, dtype=torch.int64).numpy()

        def rewind_(self, counts):
            self.tokens = self.tokens - counts

        def reorder_(self, index):
            self.tokens = self.tokens[index.numpy()]

    class Next(torch.nn.Module):
        """The token after t is t + 1, up to 9, and then 2."""

        def make_cache(self):
            return Cache()

        def forward(self, input_ids, attention_mask=None, *, cache, logits_to_keep):
            if not len(cache.tokens):
                cache.tokens = torch.zeros(len(input_ids), dtype=torch.int64).numpy()
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            cache.tokens = cache.tokens + mask.sum(1).numpy()
            rows = [row[kept.bool()][-logits_to_keep:] for row, kept in zip(input_ids, mask, strict=True)]
            rows = torch.nn.utils.rnn.pad_sequence(rows, True, 0, "left")
            return torch.nn.functional.one_hot(torch.where(rows < 9, rows + 1, 2), 10)

    model, ids = Next(), torch.tensor([[1, 2, 3], [7, 8, 9]])
    with counted(model) as calls:
        found = wf.generate(model, ids, max_new_tokens=20, **LOOKUP)
    assert torch.equal(found, wf.generate(model, ids, max_new_tokens=20))
    assert len(calls) < 16
