"""Models of transformers give patched what they give unpatched."""

import copy

import pytest
import torch

import warpformer as wf
from tests.integrations.models import MODELS, batch, make

DECODERS = [name for name, (auto, _) in MODELS.items() if "MaskedLM" not in auto.__name__]
PADDINGS = (None, "left", "right")


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    """A model, and a patched copy."""
    theirs = make(request.param)
    ours = copy.deepcopy(theirs)
    wf.patch_(ours)
    return theirs, ours


@pytest.fixture(scope="module", params=DECODERS)
def decoders(request):
    theirs = make(request.param)
    ours = copy.deepcopy(theirs)
    wf.patch_(ours)
    return theirs, ours


def call(model, inputs):
    return model(input_ids=inputs.ids, attention_mask=inputs.mask, labels=inputs.labels)


@pytest.mark.parametrize("padding", PADDINGS)
def test_logits(pair, padding):
    inputs = batch(padding)
    with torch.no_grad():
        theirs, ours = (call(model, inputs).logits for model in pair)
    if not pair[0].config.is_encoder_decoder:  # a decoder's own tokens are all there
        theirs, ours = (t[inputs.mask == 1] for t in (theirs, ours))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert theirs.std() > 0.1


@pytest.mark.parametrize("padding", PADDINGS)
def test_loss_and_gradients(pair, padding):
    inputs = batch(padding)
    losses, gradients = [], []
    for model in pair:
        model.zero_grad()
        loss = call(model, inputs).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    largest = max(g.abs().max() for g in gradients[0].values())
    assert gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4 * largest, msg=name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_greedy_tokens(decoders, cache, padding):
    inputs = batch(padding)
    theirs, ours = (
        model.generate(inputs.ids, attention_mask=inputs.mask, cache_implementation=cache)
        for model in decoders
    )
    assert torch.equal(ours, theirs)
