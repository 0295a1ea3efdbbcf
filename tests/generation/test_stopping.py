"""Stop strings, and the functions of users."""

import pytest
import torch
import transformers
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

import warpformer as wf
from warpformer.generation.stopping import StopStrings

from .models import NEW, OPTIONS, PADDING, expected, new_tokens, prompts
from .text import make_tokenizer, save_language_model


class Ban:
    """A LogitsProcessor of the user: not the last token but one."""

    def __call__(self, input_ids, scores):
        columns = torch.arange(scores.shape[1])
        return scores.masked_fill(columns == input_ids[:, -2:][:, :1], -torch.inf)


class EndAt:
    """A StoppingCriterion of the user: at a token that was there four before."""

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == input_ids[:, -5:][:, 0]


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_functions_of_users(models, name, beams):
    (model, theirs), (ids, mask) = models(name), prompts(name)
    lists = {
        "logits_processor": LogitsProcessorList([Ban()]),
        "stopping_criteria": StoppingCriteriaList([EndAt()]),
    }
    options = beams | {"eos_token_id": 14, "forced_eos_token_id": None}
    found = new_tokens(model, ids, mask, **options, **lists)
    assert torch.equal(found, expected(theirs, ids, mask, **options, **lists))
    single = {"logits_processor": Ban(), "stopping_criteria": EndAt()}
    assert torch.equal(found, new_tokens(model, ids, mask, **options, **single))
    without = new_tokens(model, ids, mask, **options)
    for argument, value in lists.items():
        one = new_tokens(model, ids, mask, **options, **{argument: value})
        assert one.shape != without.shape or not torch.equal(one, without), argument


def test_users_see_prompts_without_padding(models):
    model, (ids, mask) = models("llama")[0], prompts("llama")
    seen = []

    def look(input_ids, scores):
        seen.append(input_ids.clone())
        return scores

    new_tokens(model, ids, mask, logits_processor=look, max_new_tokens=1)
    for row, kept in enumerate(mask.bool()):
        right = ids[row, kept]
        assert torch.equal(seen[0][row, -len(right) :], right)
        assert (seen[0][row, : -len(right)] == PADDING).all()


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    folder = save_language_model(tmp_path_factory.mktemp("model"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    return wf.load(folder), theirs, make_tokenizer(), tokenizer


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_stop_strings_are_those_of_transformers(language_model, beams):
    model, theirs, ours, tokenizer = language_model
    ids = torch.tensor([ours.encode("In the beginning God").ids])
    options = {
        "max_new_tokens": 20,
        "eos_token_id": None,
        "pad_token_id": 0,
        "repetition_penalty": 1.5,
    } | beams
    plain = wf.generate(model, ids, **options)[0]
    ends = set()
    for end in range(ids.shape[1] + 2, len(plain)):
        stop = ours.decode(plain[end - 2 : end].tolist(), skip_special_tokens=False)
        if "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        stops = {"stop_strings": [stop, "never comes"]}
        found = wf.generate(model, ids, tokenizer=ours, **options, **stops)
        right = theirs.generate(ids, do_sample=False, tokenizer=tokenizer, **options, **stops)
        assert torch.equal(found, right), stop
        ends.add(found.shape[1])
    assert len(ends) > 1


def test_what_a_stop_string_is():
    tokenizer = make_tokenizer()

    def ends(text, *stops, prompt=""):
        """At which of the tokens of a text it ends."""
        tokens, found = tokenizer.encode(prompt + text).ids, []
        criterion = StopStrings(stops, tokenizer)
        for length in range(1, len(tokens) + 1):
            if criterion.is_complete(tokens[max(0, length - criterion.window) : length]):
                found.append(tokenizer.decode(tokens[:length]))
        return found

    assert ends("a b c b", "b") == ["a b", "a b c b"]
    assert ends("aaž", "ž") == ["aaž"]  # of two tokens
    assert ends("xyz abc. def", "c. d") == ["xyz abc. d"]
    assert ends("x\n\ny", "\n\n") == ["x\n\n"]
    assert ends("a</s>b", "</s>") != []
    assert ends("nothing", "else") == []


def test_stop_strings_end_rows_of_a_batch(language_model):
    model, _, tokenizer, _ = language_model
    ids = torch.tensor(
        [tokenizer.encode(text).ids[:4] for text in ("In the beginning", "God created the heaven")]
    )
    options = {"max_new_tokens": 15, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.5}
    plain = wf.generate(model, ids, **options)
    stop = tokenizer.decode(plain[1, 8:9].tolist())
    found = wf.generate(model, ids, **options, stop_strings=stop, tokenizer=tokenizer)
    for row in range(2):
        alone = wf.generate(model, ids[row][None], **options, stop_strings=stop, tokenizer=tokenizer)[0]
        assert torch.equal(found[row, : len(alone)], alone)
    assert found.shape[1] <= plain.shape[1]
    with pytest.raises(wf.InputError, match="stop_strings need a tokenizer"):
        wf.generate(model, ids, stop_strings="x")


def test_a_criterion_for_all_rows(models):
    """A bool counts for every row."""
    model, (ids, mask) = models("llama")[0], prompts("llama")
    options = OPTIONS | {"eos_token_id": None}
    found = wf.generate(model, ids, mask, stopping_criteria=lambda ids, _: ids.shape[1] >= 18, **options)
    assert found.shape == (3, 18)
    assert NEW > 3
