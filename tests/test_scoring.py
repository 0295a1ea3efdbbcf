"""Perplexity: every token of a text counts once, with the tokens before it that its window has."""

import math

import pytest
import torch
import torch.nn.functional as F

import warpformer as wf
from tests.generation.text import TEXTS, save_language_model
from warpformer.checkpoint import open_tokenizer
from warpformer.scoring import perplexity, token_losses
from warpformer.training import read_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("language_model"))


@pytest.fixture(scope="module")
def model(folder):
    return wf.load(folder)


@pytest.mark.parametrize("length", [2, 9, 10, 11, 14, 40])
@pytest.mark.parametrize("stride", [1, 4, 10])
def test_windows(model, length, stride):
    """The same, a token after the other."""
    window, tokens = 10, torch.randint(5, 260, (length,))
    losses, end = [], window
    for t in range(1, length):
        end = end if t <= end else min(end + stride, length - 1)
        logits = model(tokens[None, max(0, min(end, length - 1) - window) : t])[0, -1]
        losses.append(F.cross_entropy(logits, tokens[t]))
    for max_tokens in (1, 25, 8192):
        found = token_losses(model, tokens, window=window, stride=stride, max_tokens=max_tokens)
        torch.testing.assert_close(found, torch.stack(losses))


def test_perplexity(folder, model, tmp_path):
    path = tmp_path / "text"
    path.write_text("\n".join([*TEXTS[:2], "", *TEXTS[2:]]))
    tokenizer = open_tokenizer(folder)
    found = perplexity(model, tokenizer, read_texts(path), window=200)
    documents = ["\n".join(TEXTS[:2]), "\n".join(TEXTS[2:])]
    assert found.bytes == sum(len(text.encode()) for text in documents)
    tokens = [2, *tokenizer.encode(documents[0]).ids, 2, *tokenizer.encode(documents[1]).ids, 2]
    logits = model(torch.tensor([tokens]))[0, :-1]
    assert found.tokens == len(tokens) - 1
    assert found.loss == pytest.approx(F.cross_entropy(logits, torch.tensor(tokens[1:])).item(), rel=1e-5)
    assert math.log(found.perplexity) == pytest.approx(found.loss)
    assert found.bits_per_byte * found.bytes == pytest.approx(found.loss * found.tokens / math.log(2))


def test_bad_input(model):
    with pytest.raises(wf.InputError, match=r"stride = 11 is not in 1\.\.window = 10"):
        token_losses(model, torch.arange(30), window=10, stride=11)
    with pytest.raises(wf.InputError, match="1 tokens leave none to predict"):
        token_losses(model, torch.arange(1), window=10, stride=5)
