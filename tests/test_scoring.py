"""Perplexity: every token of a text counts once, with the tokens before it that its window has."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import warpformer as wf
from tests.generation.text import TEXTS, save_language_model, save_translator
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


CONTEXTS = ["", "In the ", "żó", "God created the heaven and the earth. "]


def test_score(folder, model):
    tokenizer = open_tokenizer(folder)
    done = []
    found = wf.score(model, TEXTS, tokenizer, CONTEXTS, progress=done.append)
    assert sum(done) == len(TEXTS)
    for text, context, of_text in zip(TEXTS, CONTEXTS, found, strict=True):
        ids = torch.tensor([1, *tokenizer.encode(context + text).ids])
        count = len(ids) - 1 - len(tokenizer.encode(context).ids)
        logits = model(ids[None])[0, :-1]
        expected = logits.log_softmax(-1).gather(1, ids[1:, None])[-count:, 0]
        torch.testing.assert_close(of_text.log_probs, expected)
        assert of_text.greedy.tolist() == (logits.argmax(-1) == ids[1:])[-count:].tolist()
        assert of_text.log_prob == pytest.approx(expected.sum().item(), rel=1e-5)
        assert of_text.perplexity == pytest.approx(math.exp(-expected.mean().item()), rel=1e-5)
    for size in (1, 40):
        for one, other in zip(
            found, wf.score(model, TEXTS, tokenizer, CONTEXTS, max_tokens=size), strict=True
        ):
            assert torch.equal(one.log_probs, other.log_probs)  # whatever the batch


def test_what_greedy_decoding_writes_is_greedy(folder, model):
    tokenizer = open_tokenizer(folder)
    written = wf.generate(model, torch.tensor([[1]]), max_new_tokens=30, suppress_tokens=[0, 1, 2, 3, 4])
    text = tokenizer.decode(written[0, 1:].tolist())
    again = [1, *tokenizer.encode(text).ids]
    (found,) = wf.score(model, [text], tokenizer)
    same = [i for i, (a, b) in enumerate(zip(again, written[0].tolist(), strict=False)) if a != b]
    assert found.greedy[: (same[0] if same else len(again)) - 1].all()


def test_texts_longer_than_the_model(folder, model, monkeypatch):
    tokenizer, text = open_tokenizer(folder), " ".join(TEXTS)
    monkeypatch.setattr(type(model.config), "max_length", 10)
    (found,) = wf.score(model, [text], tokenizer, ["In the "])
    ids = torch.tensor([1, *tokenizer.encode("In the " + text).ids])
    losses = token_losses(model, ids, window=10, stride=5)
    torch.testing.assert_close(found.log_probs, -losses[-len(found.log_probs) :])
    assert len(found.log_probs) == len(ids) - 1 - len(tokenizer.encode("In the ").ids)


def test_score_of_translations(tmp_path):
    translator = wf.Translator(save_translator(tmp_path))
    model, tokenizer = translator.model, translator.tokenizer
    found = wf.score(model, TEXTS[1:], tokenizer, TEXTS[:-1])
    for text, source, of_text in zip(TEXTS[1:], TEXTS[:-1], found, strict=True):
        read = torch.tensor([[*tokenizer.encode(source).ids, 2]])
        target = torch.tensor([1, *tokenizer.encode(text).ids, 2])
        logits = model(read, decoder_input_ids=target[None, :-1])[0]
        expected = logits.log_softmax(-1).gather(1, target[1:, None])[:, 0]
        torch.testing.assert_close(of_text.log_probs, expected)
    with pytest.raises(wf.InputError, match="needs contexts, which its encoder reads"):
        wf.score(model, TEXTS, tokenizer)
    with pytest.raises(wf.InputError, match=r"tokens behind .*, and the model reads 64"):
        wf.score(model, ["x" * 100], tokenizer, ["y"])


def test_int8_cache(model):
    """As decoding a token after the other does."""
    tokens = torch.randint(5, 260, (20,))
    found = token_losses(model, tokens, window=40, stride=20, int8_cache=True)
    cache, losses = model.make_cache(dtype=torch.int8), []
    with torch.no_grad():
        for token, label in pairwise(tokens):
            logits = model(token[None, None], cache=cache)[0, -1]
            losses.append(F.cross_entropy(logits, label))
    torch.testing.assert_close(found, torch.stack(losses))
    exact = token_losses(model, tokens, window=40, stride=20)
    assert not torch.equal(exact, found)
    torch.testing.assert_close(exact, found, atol=0.02, rtol=0)


def test_bad_texts(folder, model):
    tokenizer = open_tokenizer(folder)
    with pytest.raises(wf.InputError, match="there are 1 contexts of 2 texts"):
        wf.score(model, ["a", "b"], tokenizer, ["c"])
    with pytest.raises(wf.InputError, match="'' leaves no token to predict"):
        wf.score(model, ["a", ""], tokenizer)
    with pytest.raises(TypeError, match="texts must be strings, one is int"):
        wf.score(model, [1], tokenizer)
