"""generate(cache=): the beginning of prompts that is computed already, and turns that follow each other."""

import pytest
import torch

import warpformer as wf

from .models import OPTIONS, PADDING, counted, prompts

NAMES = ["llama", "mistral", "gemma2", "deepseek-v2", "gpt2"]
DRAWS = {"do_sample": True, "top_p": 0.9, "seed": 3, "num_return_sequences": 2}
EACH = [{}, DRAWS, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}, {"prompt_lookup_num_tokens": 4}]


def with_prefix(prefix, ids, mask):
    """Prompts that begin with `prefix` [P]."""
    beginning = prefix.expand(len(ids), -1)
    return torch.cat([beginning, ids], 1), torch.cat([torch.ones_like(beginning), mask], 1)


def held(model, prefix, **options):
    """A cache of one sequence."""
    cache = model.make_cache(**options)
    with torch.no_grad():
        model(prefix[None], cache=cache)
    return cache


@pytest.mark.parametrize("options", EACH, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_shared(models, name, options):
    """Tokens are the same with it, and it is not changed."""
    model, prefix = models(name)[0], torch.arange(11, 31)
    ids, mask = with_prefix(prefix, *prompts(name))
    options = OPTIONS | options
    expected = wf.generate(model, ids, mask, **options)
    shared = held(model, prefix)
    with counted(model) as calls:
        found = wf.generate(model, ids, mask, cache=shared.fork([0, 0, 0]), **options)
    read, there = calls[0]
    assert read.shape[1] == ids.shape[1] - 20  # the prefix is not
    assert there.sum() == mask.sum() - 60
    assert torch.equal(found, expected)
    assert shared.tokens.tolist() == [20]


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 4}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_turns_go_on(models, name, drafts):
    """Afterwards a cache holds all tokens of each row but the last, whenever the row ended."""
    model, (ids, mask) = models(name)[0], prompts(name)
    options = OPTIONS | {"max_new_tokens": 9, "repetition_penalty": 1.2} | drafts
    cache = model.make_cache()
    for _ in range(2):
        expected = wf.generate(model, ids, mask, **options)
        found = wf.generate(model, ids, mask, cache=cache, **options)
        assert torch.equal(found, expected)
        new = found[:, ids.shape[1] :]
        ended = torch.isin(new, torch.tensor(OPTIONS["eos_token_id"])).int()
        there = torch.cat([mask, (ended.cumsum(1) - ended == 0).int()], 1)
        assert cache.tokens.tolist() == (there.sum(1) - 1).tolist()
        user = torch.tensor([[7, 8], [9, 10], [11, 12]])
        ids = torch.cat([found.masked_fill(there == 0, PADDING), user], 1)
        mask = torch.cat([there, torch.ones_like(user)], 1)
    with torch.no_grad():  # what it holds is what one call would have given
        tokens, kept = ids[:, :-2], mask[:, :-2].clone()
        last = kept.shape[1] - 1 - kept.flip(1).argmax(1)
        kept[torch.arange(3), last] = 0
        fresh = model.make_cache()
        model(tokens, kept, cache=fresh)
        again = [model(user, cache=each, logits_to_keep=1) for each in (cache, fresh)]
    torch.testing.assert_close(*again, rtol=1e-4, atol=1e-4)


def test_rows_leave_at_unequal_times(models):
    """Without which the test above would show less."""
    model, (ids, mask) = models("llama")[0], prompts("llama")
    cache = model.make_cache()
    wf.generate(model, ids, mask, cache=cache, **OPTIONS)
    assert len(set((cache.tokens - mask.sum(1).numpy()).tolist())) > 1


def test_sequences_of_a_prompt_are_held(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    cache = model.make_cache()
    found = wf.generate(model, ids, mask, cache=cache, **OPTIONS | DRAWS | {"eos_token_id": None})
    assert cache.tokens.tolist() == [row + 13 for row in mask.sum(1).repeat_interleave(2).tolist()]
    turn = torch.cat([found, found[:, :1]], 1)
    kept = torch.cat([mask.repeat_interleave(2, 0), torch.ones(6, 15, dtype=torch.int64)], 1)
    options = OPTIONS | {"max_new_tokens": 5}
    right = wf.generate(model, turn, kept, **options)
    assert torch.equal(wf.generate(model, turn, kept, cache=cache, **options), right)


def test_beams_begin_with_a_prefix(models):
    """And leave the cache as it is."""
    model, prefix = models("llama")[0], torch.arange(11, 31)
    ids, mask = with_prefix(prefix, *prompts("llama"))
    cache = held(model, prefix).fork([0, 0, 0])
    expected = wf.generate(model, ids, mask, num_beams=3, **OPTIONS)
    for _ in range(2):
        assert torch.equal(wf.generate(model, ids, mask, cache=cache, num_beams=3, **OPTIONS), expected)
        assert cache.tokens.tolist() == [20, 20, 20]


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 5}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "bart", "t5"])
def test_a_cache_of_another_kind(models, name, options):
    """Of int8, which is what makes the cache: tokens with drafts are those of an int8 cache without."""
    model, (ids, mask) = models(name)[0], prompts(name)
    plain = {key: value for key, value in options.items() if key == "num_beams"}
    caches = [model.make_cache(dtype=torch.int8) for _ in range(2)]
    found = wf.generate(model, ids, mask, cache=caches[0], **OPTIONS, **options)
    assert torch.equal(found, wf.generate(model, ids, mask, cache=caches[1], **OPTIONS, **plain))
    if "num_beams" not in options:
        assert caches[0].tokens.tolist() == caches[1].tokens.tolist()
        assert 0 < caches[0].memory().held < full_memory(model, ids, mask)


def full_memory(model, ids, mask):
    cache = model.make_cache()
    wf.generate(model, ids, mask, cache=cache, **OPTIONS)
    return cache.memory().held


def test_a_cache_of_an_encoder_decoder_model_holds_what_was_read(models):
    model, (ids, mask) = models("bart")[0], prompts("bart")
    cache = model.make_cache()
    found = wf.generate(model, ids, mask, cache=cache, **OPTIONS | {"eos_token_id": None})
    with torch.no_grad():
        logits = model(decoder_input_ids=found[:, -1:], cache=cache)
        whole = model(ids, mask, found, logits_to_keep=1)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(wf.InputError, match="give one that holds nothing"):
        wf.generate(model, ids, mask, cache=cache, **OPTIONS)


def test_an_error_leaves_the_cache_as_it_was(models):
    model, prefix = models("llama")[0], torch.arange(11, 31)
    ids, mask = with_prefix(prefix, *prompts("llama"))
    cache = held(model, prefix, max_tokens=96).fork([0, 0, 0])
    before = cache.free_tokens
    with pytest.raises(wf.nn.CacheFull):
        wf.generate(model, ids, mask, cache=cache, **OPTIONS | {"max_new_tokens": 29, "eos_token_id": None})
    assert cache.tokens.tolist() == [20, 20, 20]
    assert cache.free_tokens == before

    def fails(input_ids, scores):
        if input_ids.shape[1] > 38:
            raise KeyError("of the user")
        return scores

    cache = held(model, prefix).fork([0, 0, 0])
    with pytest.raises(KeyError):
        wf.generate(model, ids, mask, cache=cache, logits_processor=fails, **OPTIONS)
    expected = wf.generate(model, ids, mask, **OPTIONS)
    assert torch.equal(wf.generate(model, ids, mask, cache=cache, **OPTIONS), expected)


def test_bad_caches(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    prefix = held(model, ids[0, :10])
    for cache, message in (
        ("dynamic", "cache = str is not a KVCache"),
        (prefix, r"the cache holds 1 sequences, and there are 3 prompts: cache.fork\(index\)"),
        (prefix.fork([0, 0, 0]), r"holds \[10, 10, 10\] tokens, and the prompts have \[15, 5, 10\]"),
    ):
        with pytest.raises(wf.InputError, match=message):
            wf.generate(model, ids, mask, cache=cache, **OPTIONS)
