"""Patience and diverse groups, which transformers 5 has not, beside a search written out in lists; n-best."""

import itertools
import random
from unittest import mock

import pytest
import torch

import warpformer as wf

from .models import OPTIONS, expected, new_tokens, prompts

VOCABULARY, EOS, NEW = 16, [3, 7], 6


class Markov(torch.nn.Module):
    """Random logits for each pair of last tokens."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = 2 * torch.randn(VOCABULARY, VOCABULARY, VOCABULARY, generator=generator)
        self.before = None

    def make_cache(self):
        return self

    def reorder_(self, index):
        self.before = self.before[index]

    def forward(self, input_ids, attention_mask=None, *, cache, logits_to_keep):
        previous = input_ids[:, -2] if input_ids.shape[1] > 1 else self.before
        self.before = input_ids[:, -1]
        return self.table[previous, self.before][:, None]


def search(table, prompt, *, num_beams, groups=1, diversity=0.0, patience=1.0, penalty=1.0, early=False):
    """(worth, new tokens) of one row, the best first."""
    table = table.double().log_softmax(-1).tolist()
    count = num_beams // groups
    wanted = max(1, round(patience * count))
    running, results, done = (
        [[(0.0, [])] for _ in range(groups)],
        [[] for _ in range(groups)],
        [False] * groups,
    )
    for length in range(1, NEW + 1):
        penalties = [0.0] * VOCABULARY
        for group in (g for g in range(groups) if not done[g]):
            candidates = []
            for (score, tokens), token in itertools.product(running[group], range(VOCABULARY)):
                before, last = [*prompt, *tokens][-2:]
                log_prob = table[before][last][token]
                candidates.append((score + log_prob - penalties[token], [*tokens, token]))
            candidates = sorted(candidates, reverse=True)[: count * (1 + len(EOS))]
            for score, tokens in candidates[:count]:
                if tokens[-1] in EOS or length == NEW:
                    results[group].append((score / length**penalty, tokens))
            results[group] = sorted(results[group], reverse=True)[:wanted]
            going = [c for c in candidates if c[1][-1] not in EOS and length < NEW]
            running[group] = going[:count]
            for _, tokens in [c for c in candidates if c[1][-1] not in EOS][:count]:
                penalties[tokens[-1]] += diversity
            done[group] = not going or (
                len(results[group]) == wanted
                and (
                    early is True
                    or worth(running[group][0][0], length, penalty, early) <= results[group][-1][0]
                )
            )
    return sorted((result for group in results for result in group), reverse=True)


def worth(score, length, penalty, early):
    return score / (NEW if early == "never" and penalty > 0 else length) ** penalty


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [0.0, 1.0, -1.0])
@pytest.mark.parametrize(
    "shape",
    [(4, 1, 1.0), (2, 1, 2.0), (4, 1, 0.5), (3, 1, 1.5), (4, 2, 1.0), (4, 4, 1.0), (4, 2, 2.0)],
    ids=str,
)
def test_beams_are_those_of_the_search_in_lists(shape, penalty, early):
    num_beams, groups, patience = shape
    for seed in range(4):
        model, diversity = Markov(seed), 0.0 if groups == 1 else random.Random(seed).choice([0.3, 1.0, 4.0])
        ids = torch.tensor([[1, 2], [5, 9], [12, 4]])
        count = groups * max(1, round(patience * num_beams / groups))
        found = wf.generate(
            model,
            ids,
            num_beams=num_beams,
            num_beam_groups=groups,
            diversity_penalty=diversity,
            patience=patience,
            length_penalty=penalty,
            early_stopping=early,
            num_return_sequences=count,
            max_new_tokens=NEW,
            eos_token_id=EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        options = {"groups": groups, "diversity": diversity, "patience": patience}
        for row, prompt in enumerate(ids.tolist()):
            right = search(model.table, prompt, num_beams=num_beams, penalty=penalty, early=early, **options)
            ours = found.sequences[row * count : (row + 1) * count, 2:]
            worths = found.sequences_scores[row * count : (row + 1) * count]
            for tokens, score, (right_score, right_tokens) in zip(ours.tolist(), worths, right, strict=False):
                assert tokens == right_tokens + [0] * (len(tokens) - len(right_tokens))
                assert score.item() == pytest.approx(right_score, rel=1e-4, abs=1e-4)
            assert (worths[len(right) :] == -torch.inf).all()  # a group whose beams have all ended


def test_options_that_transformers_has_not_count():
    """Without which the test above would show less."""
    ids = torch.tensor([[a, b] for a in range(8) for b in range(8)])
    options = {"max_new_tokens": NEW, "eos_token_id": EOS, "num_beams": 4, "early_stopping": True}
    plain = wf.generate(Markov(0), ids, **options)
    for changed in ({"patience": 3.0}, {"num_beam_groups": 2, "diversity_penalty": 2.0}):
        found = wf.generate(Markov(0), ids, **options | changed)
        assert found.shape != plain.shape or not torch.equal(found, plain)


def test_groups_differ():
    options = {"num_beams": 4, "max_new_tokens": NEW, "eos_token_id": None, "num_return_sequences": 4}
    found = wf.generate(
        Markov(0), torch.tensor([[1, 2]]), num_beam_groups=4, diversity_penalty=100.0, **options
    )
    for position in range(NEW):
        assert len(set(found[:, 2 + position].tolist())) == 4


def test_fewer_results_than_asked_for():
    """Where the options allow but one, others are padding, and worth nothing."""
    options = {"max_new_tokens": 1, "eos_token_id": 3, "pad_token_id": 0, "forced_eos_token_id": 3}
    options |= {"num_beams": 2, "num_return_sequences": 2, "return_dict_in_generate": True}
    found = wf.generate(Markov(0), torch.tensor([[1, 2]]), **options)
    assert found.sequences.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert found.sequences_scores.tolist() == [0.0, -torch.inf]


@pytest.mark.parametrize("name", ["qwen2", "mbart"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": -0.5, "early_stopping": "never"},
        {"num_beams": 4, "num_return_sequences": 4, "forced_bos_token_id": 40, "max_new_tokens": 4},
    ],
    ids=str,
)
def test_the_best_are_those_of_transformers(models, name, options):
    (model, theirs), (ids, mask) = models(name), prompts(name)
    found = new_tokens(model, ids, mask, **options)
    assert len(found) == len(ids) * options["num_return_sequences"]
    assert torch.equal(found, expected(theirs, ids, mask, **options))


@pytest.mark.parametrize(
    "options", [{"num_beam_groups": 2, "diversity_penalty": 0.7}, {"patience": 1.6}], ids=str
)
def test_a_row_gives_the_same_beams_alone_and_in_a_batch(models, options):
    model, (ids, mask) = models("bart")[0], prompts("bart")
    options = options | {"num_beams": 4, "num_return_sequences": 3, "repetition_penalty": 1.2}
    together = new_tokens(model, ids, mask, **options)
    for row, kept in enumerate(mask.bool()):
        alone = new_tokens(model, ids[row, kept][None], None, **options)
        found = together[3 * row : 3 * row + 3]
        assert torch.equal(alone, found[:, : alone.shape[1]])
        assert (found[:, alone.shape[1] :] == OPTIONS["pad_token_id"]).all()


def test_steps_repeat_a_recording(models):
    """The first has the prompt, the second is recorded."""
    model, (ids, mask) = models("bart")[0], prompts("bart")
    decode = type(model.backbone).decode
    with mock.patch.object(type(model.backbone), "decode", autospec=True, side_effect=decode) as decoded:
        new_tokens(model, ids, mask, num_beams=3, eos_token_id=None)
    assert decoded.call_count == 2
