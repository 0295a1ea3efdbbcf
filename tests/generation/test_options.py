"""Each option of transformers, and many together: its tokens, greedily and by beams."""

import pytest
import torch

import warpformer as wf
from tests.models.checkpoints import DECODERS, SEQ2SEQ

from .models import EOS, PADDING, expected, new_tokens, prompts

BEAMS = {"num_beams": 3}
EACH = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"bad_words_ids": [[68], [50, 50], [14], [31, 12, 40], [0, 2, 88]]},
    {"suppress_tokens": [68, 8, 90]},
    {"begin_suppress_tokens": [68, 8, 50]},
    {"begin_suppress_tokens": [68, 8, 50], "forced_bos_token_id": 33},
    {"min_new_tokens": 9},
    {"min_length": 12},
    {"max_new_tokens": None, "max_length": 17},
    {"forced_bos_token_id": 33},
    {"forced_eos_token_id": [11, 96]},
    {"renormalize_logits": True, "suppress_tokens": [68, 8, 90]},
    {"eos_token_id": 88},
    {"eos_token_id": None, "forced_eos_token_id": None},
    {"max_new_tokens": 1},
]
MANY = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[40], [74, 40]],
    "min_new_tokens": 5,
    "suppress_tokens": [12, 90],
    "begin_suppress_tokens": [30, 31],
    "forced_bos_token_id": 33,
    "forced_eos_token_id": 5,
    "renormalize_logits": True,
}


def same_tokens(models, name, options):
    (model, theirs), (ids, mask) = models(name), prompts(name)
    found, right = new_tokens(model, ids, mask, **options), expected(theirs, ids, mask, **options)
    assert torch.equal(found, right), f"{found.tolist()}\n{right.tolist()}"
    return found


@pytest.mark.parametrize("beams", [{}, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("options", EACH, ids=str)
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_each_option(models, name, options, beams):
    same_tokens(models, name, options | beams)


@pytest.mark.parametrize("beams", [{}, BEAMS | {"num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_many_options(models, name, beams):
    same_tokens(models, name, MANY | beams)


@pytest.mark.parametrize("options", EACH, ids=str)
def test_each_option_counts(models, options):
    """Without which the tests above would show less."""
    for name in ("llama", "bart"):
        model, (ids, mask) = models(name)[0], prompts(name)
        found = [new_tokens(model, ids, mask, **chosen) for chosen in ({}, options)]
        if found[0].shape != found[1].shape or not torch.equal(*found):
            return
    raise AssertionError(options)


@pytest.mark.parametrize("prefix", [[[9, 44], [50, 9], [61, 62]], [[2, 9], [2, 7], [2, 44]]], ids=str)
@pytest.mark.parametrize("beams", [{}, BEAMS], ids=["greedy", "beams"])
def test_a_decoder_goes_on_from_its_prefix(models, prefix, beams):
    (model, theirs), (ids, mask) = models("bart"), prompts("bart")
    prefix = torch.tensor(prefix)
    options = MANY | beams | {"eos_token_id": EOS, "max_new_tokens": 6, "pad_token_id": PADDING}
    found = wf.generate(model, ids, mask, decoder_input_ids=prefix, **options)
    for row, kept in enumerate(mask.bool()):
        options |= {"decoder_input_ids": prefix[row][None], "do_sample": False}
        alone = theirs.generate(ids[row, kept][None], **options)
        assert torch.equal(found[row, : alone.shape[1]], alone[0])


def test_prefixes_of_unequal_lengths(models):
    model, (ids, mask) = models("marian")[0], prompts("marian")
    prefix, there = (
        torch.tensor([[9, 44, 4], [0, 50, 9], [61, 0, 0]]),
        torch.tensor([[1] * 3, [0, 1, 1], [1, 0, 0]]),
    )
    options = {"max_new_tokens": 6, "repetition_penalty": 1.5}
    found = wf.generate(model, ids, mask, decoder_input_ids=prefix, decoder_attention_mask=there, **options)
    assert found[:, 0].tolist() == [96] * 3
    for row in range(3):
        alone = wf.generate(
            model,
            ids[row, mask[row].bool()][None],
            decoder_input_ids=prefix[row, there[row].bool()][None],
            **options,
        )
        new = alone[0, 1 + there[row].sum() :]
        assert torch.equal(new, found[row, 4 : 4 + len(new)])


class Fixed(torch.nn.Module):
    """A model whose logits are always the same."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.tensor(logits)

    def make_cache(self):
        return self

    def reorder_(self, index):
        pass

    def forward(self, input_ids, attention_mask=None, *, cache, logits_to_keep):
        return self.logits.expand(len(input_ids), 1, -1)


def test_frequency_and_presence():
    """Logits 3, 2.5, 0: what has been written loses 1 once, or 0.4 each time; the prompt does not count."""
    model, prompt = Fixed([3.0, 2.5, 0.0, -9.0]), torch.tensor([[0, 0, 2]])

    def written(**options):
        return wf.generate(model, prompt, max_new_tokens=6, **options)[0, 3:].tolist()

    assert written() == [0] * 6
    assert written(presence_penalty=1.0) == [0, 1, 0, 0, 0, 0]
    assert written(frequency_penalty=0.4) == [0, 0, 1, 0, 1, 0]
    assert written(frequency_penalty=0.4, presence_penalty=2.0) == [0, 1, 0, 0, 1, 2]
    assert written(frequency_penalty=-0.5, presence_penalty=5.5) == [0, 1, 2, 0, 0, 0]


def test_log_probs_are_the_models_own(models):
    (model, theirs), (ids, _) = models("llama"), prompts("llama")
    options = MANY | {"max_new_tokens": 6, "eos_token_id": None, "forced_eos_token_id": None}
    found = wf.generate(model, ids, return_dict_in_generate=True, **options)
    assert found.sequences_scores is None
    logits = theirs(found.sequences).logits[:, ids.shape[1] - 1 : -1]
    right = logits.log_softmax(-1).gather(2, found.sequences[:, ids.shape[1] :, None])[..., 0]
    torch.testing.assert_close(found.log_probs, right, rtol=1e-4, atol=1e-4)
    assert torch.equal(wf.generate(model, ids, **options), found.sequences)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_scores_of_beams(models, name):
    (model, theirs), (ids, _) = models(name), prompts(name)
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.7, "max_new_tokens": 8}
    options |= {"eos_token_id": EOS, "pad_token_id": 96, "forced_eos_token_id": None}
    options["return_dict_in_generate"] = True
    found = wf.generate(model, ids, **options)
    right = theirs.generate(ids, output_scores=True, do_sample=False, **options)
    assert torch.equal(found.sequences, right.sequences)
    torch.testing.assert_close(found.sequences_scores, right.sequences_scores, rtol=1e-4, atol=1e-4)
    sizes = (found.log_probs != 0).sum(1)
    torch.testing.assert_close(found.log_probs.sum(1) / sizes**0.7, found.sequences_scores)
