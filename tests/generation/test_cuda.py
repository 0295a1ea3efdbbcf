"""What only a GPU shows: a step of decoding is one CUDA graph, which nothing waits for. Collected where there
is one."""

from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch

import warpformer as wf
from tests.check import same_bits
from tests.models.checkpoints import DECODERS

from .models import OPTIONS, prompts

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)


@contextmanager
def no_waiting():
    """Nothing that reads from the GPU, or waits for a copy to it."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_is_a_graph(models, device, name):
    model = deepcopy(models(name)[0]).to(device)
    ids, mask = (t.to(device) for t in prompts(name))
    plain, recorded = model.make_cache(), model.make_cache()
    recorded.record_()
    with torch.no_grad():
        for cache in (plain, recorded):
            model(ids, mask, cache=cache)
        for step in range(40):
            tokens = torch.randint(3, 90, (len(ids), 1))
            expected = model(tokens, cache=plain)
            if step < 2:
                found = model(tokens, cache=recorded)
            else:
                with no_waiting():
                    found = model(tokens, cache=recorded)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    (call,) = recorded._recorded._calls.values()
    assert call is not None
    assert [part.__name__ for part in call.recording._parts] == ["replay"]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_p": 0.9, "temperature": 0.7}], ids=str)
def test_tokens_of_another_stream_are_the_same(models, device, options):
    model = deepcopy(models("llama")[0]).to(device)
    ids, mask = (t.to(device) for t in prompts("llama"))
    expected = wf.generate(model, ids, mask, seed=1, **OPTIONS | options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = wf.generate(model, ids, mask, seed=1, **OPTIONS | options)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(found, expected)


def test_an_engine_writes_what_generate_does(models, device):
    model = deepcopy(models("llama")[0]).to(device)
    prompt = [torch.randint(3, 90, (count,), device="cpu") for count in (5, 9, 14)]
    options = {"max_new_tokens": 20, "eos_token_id": None}
    with wf.Engine(model, max_batch=2) as engine:
        requests = [engine.submit(ids, **options) for ids in prompt]
        found = [request.result()[0] for request in requests]
    for ids, tokens in zip(prompt, found, strict=True):
        assert tokens == wf.generate(model, ids[None].to(device), **options)[0, len(ids) :].tolist()
