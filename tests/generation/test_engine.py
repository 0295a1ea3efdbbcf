"""Many requests at once: each gets what it gets alone, whoever else is there, and nothing is left behind."""

import gc
import queue
import random
import resource
import threading
from pathlib import Path

import pytest
import torch

import warpformer as wf
from warpformer.generation.running import Running
from warpformer.models import llama
from warpformer.nn import CacheFull, recorded_calls

VOCABULARY = 60
EOS = [5, 14, 15, 18]
OPTIONS = {"eos_token_id": EOS, "pad_token_id": 1}


@pytest.fixture(scope="module")
def model():
    return make_llama()


def make_llama(layers=2, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4)
    config = llama.Config(vocab_size=VOCABULARY, **sizes, **options)
    model = llama.CausalLM(llama.Model(config), config).eval()
    with torch.no_grad():
        model.backbone.tokens.weight.mul_(50)
    return model


def prompt_of(length):
    return torch.randint(3, VOCABULARY, (length,))


def alone(model, prompt, **options):
    """(tokens, reason) of `generate`."""
    tokens = wf.generate(model, prompt[None], **OPTIONS | options)[0, len(prompt) :].tolist()
    return tokens, "stop" if tokens[-1] in EOS else "length"


def check_empty(engine):
    """Nobody has a block."""
    assert len(engine.cache) == 0
    for table in engine.cache.tables.values():
        assert table.pool.used == 0
        assert not table.pool.users.any()


def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 20}
MODELS = ["llama", "mistral", "gemma2", "deepseek-v2", "gpt2", "t5", "bart", "marian"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampled", [False, True])
def test_models(models, name, sampled):
    """Prompts of several chunks among others."""
    model, _ = models(name)
    options = {"eos_token_id": 5, "pad_token_id": 1, "max_new_tokens": 12} | (SAMPLED if sampled else {})
    prompts = [torch.randint(20, 90, (length,)) for length in (3, 20, 1, 9, 8, 17, 2)]
    with wf.Engine(model, max_batch=4, prefill_chunk=8) as engine:
        requests = [engine.submit(prompt, seed=i, **options) for i, prompt in enumerate(prompts)]
        found = [request.result(60).tokens for request in requests]
    start = 1 if hasattr(model, "encode") else None
    for i, (prompt, tokens) in enumerate(zip(prompts, found, strict=True)):
        expected = wf.generate(model, prompt[None], seed=i, **options)[0]
        assert tokens == expected[start or len(prompt) :].tolist()
    check_empty(engine)


def test_many(model):
    """Of random lengths, from several threads, with cancels, a short queue and functions that raise."""

    def raises(input_ids, scores):
        if input_ids.shape[1] > 12:
            raise ZeroDivisionError("a user's")
        return scores

    cache = model.make_cache(max_tokens=1500)
    engine = wf.Engine(model, cache=cache, max_batch=12, max_waiting=5, prefill_chunk=16)
    found, full, lock = [], [0], threading.Lock()

    def client(number):
        rng = random.Random(number)
        for _ in range(20):
            prompt = torch.tensor([rng.randrange(3, VOCABULARY) for _ in range(rng.choice([1, 7, 30, 90]))])
            kind = rng.choice(["greedy", "sampled", "cancelled", "raises", "penalty"])
            options = dict(OPTIONS, max_new_tokens=rng.randrange(1, 40))
            if kind == "sampled":
                options |= SAMPLED | {"seed": rng.randrange(1000)}
            if kind == "penalty":
                options |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
            if kind == "raises":
                options["logits_processor"] = raises
            while True:
                try:
                    request = engine.submit(prompt, block=rng.random() < 0.5, **options)
                    break
                except queue.Full:
                    with lock:
                        full[0] += 1
            if kind == "cancelled":
                next(iter(request), None)
                request.cancel()
            with lock:
                found.append((kind, prompt, options, request))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(10)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    engine.close()
    assert len(found) == 200
    assert full[0]
    raised = 0
    for kind, prompt, options, request in found:
        if kind != "raises":
            tokens, reason = request.result(0)
            expected = alone(model, prompt, **{k: v for k, v in options.items() if k not in OPTIONS})
            assert (tokens, reason) == expected or (
                kind == "cancelled" and reason == "cancelled" and tokens == expected[0][: len(tokens)]
            )
            continue
        try:
            request.result(0)
            assert len(prompt) + options["max_new_tokens"] <= 13 or request.last in EOS
        except ZeroDivisionError:
            raised += 1
    assert raised
    check_empty(engine)


def test_requests_that_differ_in_length_choose_together(model, monkeypatch):
    """One call for all, whatever limits each has; forced ends are each one's own."""
    rows, choose = [], wf.ops.sample

    def watched(scores, *args, **options):
        rows.append(len(scores))
        return choose(scores, *args, **options)

    prompts = [prompt_of(length) for length in (3, 5, 2, 9)]
    limits = [{"max_new_tokens": 4}, {"max_new_tokens": 7}, {"max_length": 12}, {"max_length": 14}]
    with wf.Engine(model) as engine:
        monkeypatch.setattr(wf.ops, "sample", watched)
        engine._changed.acquire()  # until all are there
        try:
            requests = [
                engine.submit(prompt, forced_eos_token_id=9, **OPTIONS | limit)
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
        finally:
            engine._changed.release()
        found = [request.result(60) for request in requests]
    monkeypatch.undo()
    assert rows[0] == 4
    assert len(rows) == max(len(tokens) for tokens, _ in found)
    for prompt, limit, (tokens, _) in zip(prompts, limits, found, strict=True):
        assert tokens == alone(model, prompt, forced_eos_token_id=9, **limit)[0]


@pytest.mark.parametrize("name", ["llama", "mistral", "t5"])
def test_recordings_outlive_joins(models, name, monkeypatch):
    """There is one for each number of sequences, once as many have been there as may be."""
    model, made = models(name)[0], []

    class Counted(recorded_calls.Recording):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(recorded_calls, "Recording", Counted)
    start = 1 if hasattr(model, "encode") else None
    options = {"eos_token_id": None, "pad_token_id": 1}
    with wf.Engine(model, cache=model.make_cache(max_tokens=4 * 96), max_batch=3) as engine:

        def serve(lengths):
            """How many recordings it takes."""
            prompts = [torch.randint(20, 90, (length,)) for length, _ in lengths]
            limits = [{"max_new_tokens": new} | options for _, new in lengths]
            expected = [
                wf.generate(model, prompt[None], **limit)[0, start or len(prompt) :].tolist()
                for prompt, limit in zip(prompts, limits, strict=True)
            ]
            made.clear()
            with engine._changed:  # until all are there
                requests = [
                    engine.submit(prompt, **limit) for prompt, limit in zip(prompts, limits, strict=True)
                ]
            assert [request.result(60).tokens for request in requests] == expected
            return len(made)

        assert serve([(30, 4), (30, 8), (30, 12)]) == 3
        assert serve([(30, 3), (5, 9), (11, 4), (20, 1), (2, 12), (17, 6), (3, 7)]) == 0
    check_empty(engine)


def test_the_batch_is_full_while_requests_wait(model, monkeypatch):
    """Who joins has a token of the step, too."""
    rows, read_on = [], Running._read_on

    def watched(running, requests):
        rows.append(len(requests))
        read_on(running, requests)

    monkeypatch.setattr(Running, "_read_on", watched)
    options = dict(eos_token_id=None, suppress_tokens=EOS)
    with wf.Engine(model, max_batch=2) as engine:
        with engine._changed:
            requests = [engine.submit([7, 8], max_new_tokens=new, **options) for new in (3, 5, 2, 4, 9, 2, 5)]
        found = [request.result(60).tokens for request in requests]
    assert [len(tokens) for tokens in found] == [3, 5, 2, 4, 9, 2, 5]
    assert sum(rows) == sum(map(len, found)) - len(found)
    assert rows == sorted(rows, reverse=True)


def test_int8_cache_and_bfloat16():
    """The same bits under any load, where rounding could tell."""
    model = make_llama().to(torch.bfloat16)
    prompts = [prompt_of(length) for length in (40, 3, 25, 60, 16, 17)]

    def run(batch):
        cache = model.make_cache(dtype=torch.int8)
        with wf.Engine(model, cache=cache, max_batch=batch, prefill_chunk=16) as engine:
            requests = [engine.submit(prompt, max_new_tokens=20, **OPTIONS) for prompt in prompts]
            return [request.result(60).tokens for request in requests]

    assert run(1) == run(6) == run(3)


def test_a_long_prompt_stops_nobody(model):
    """It is read beside the tokens of the others; they are served in their order."""
    calls = []
    forward = model.backbone.forward_rows

    def watched(ids, mask=None, *args, **options):
        calls.append((ids.shape[0], ids.numel() if mask is None else int(mask.sum())))
        return forward(ids, mask, *args, **options)

    model.backbone.forward_rows = watched
    order = []
    try:
        with wf.Engine(model, max_batch=2, prefill_chunk=16) as engine:
            steps = dict(max_new_tokens=60, eos_token_id=None, suppress_tokens=EOS)
            first = engine.submit(prompt_of(4), on_token=lambda _: order.append("first"), **steps)
            next(iter(first))
            second = engine.submit(prompt_of(200), on_token=lambda _: order.append("second"), **steps)
            third = engine.submit(prompt_of(2), on_token=lambda _: order.append("third"), **steps)
            for request in (first, second, third):
                request.result(60)
    finally:
        del model.backbone.forward_rows
    assert max(tokens for _, tokens in calls) <= 16 + 1
    assert order.index("second") - order.index("first") >= 200 // 16 - 1
    assert order.index("third") > max(i for i, name in enumerate(order) if name == "first")


def test_prefix(model):
    system, prompts = prompt_of(37), [prompt_of(length) for length in (1, 5, 20)]
    options = {"max_new_tokens": 8, "repetition_penalty": 1.2}
    with wf.Engine(model, cache=model.make_cache(max_tokens=512), prefill_chunk=8) as engine:
        prefix = engine.prefix(system)
        for _ in range(2):
            requests = [engine.submit(prompt, prefix=prefix, **OPTIONS, **options) for prompt in prompts]
            for prompt, request in zip(prompts, requests, strict=True):
                expected = alone(model, torch.cat([system, prompt]), **options)
                assert request.result(60) == expected
        assert engine.cache.memory().held > 0
        engine.forget(prefix)
    check_empty(engine)


def test_a_forgotten_prefix_goes_after_its_last_request(model):
    """Also where that has not begun."""
    system = prompt_of(37)
    endless = dict(max_new_tokens=400, eos_token_id=None, suppress_tokens=EOS)
    with wf.Engine(model, max_batch=1) as engine:
        before = engine.submit(prompt_of(3), **endless)
        prefix = engine.prefix(system)
        request = engine.submit([7], prefix=prefix, max_new_tokens=4, **OPTIONS)
        engine.forget(prefix)
        before.cancel()
        assert request.result(60) == alone(model, torch.cat([system, torch.tensor([7])]), max_new_tokens=4)
        engine.submit([7], max_new_tokens=4, **OPTIONS).result(60)
        assert prefix.cache is None


def test_two_prefixes_have_room(model):
    """Each has a last block that its request copies, and that is counted before either is read."""
    limits, both_wait = dict(eos_token_id=None, suppress_tokens=EOS), threading.Event()
    with wf.Engine(model, cache=model.make_cache(max_tokens=3 * 32)) as engine:
        engine.submit([7], max_new_tokens=1, on_token=lambda _: both_wait.wait(60), **limits)
        prefixes = [engine.prefix(prompt_of(5)) for _ in range(2)]
        requests = [engine.submit([7], prefix=p, max_new_tokens=27, **limits) for p in prefixes]
        both_wait.set()
        for request in requests:
            assert len(request.result(60).tokens) == 27


def test_a_prefix_that_fails_holds_nothing():
    model = make_llama()
    model.backbone.norm.forward = lambda x: 1 / 0
    with wf.Engine(model) as engine:
        request = engine.submit([7], prefix=engine.prefix(prompt_of(5)), max_new_tokens=4, **OPTIONS)
        with pytest.raises(ZeroDivisionError):
            request.result(60)
    check_empty(engine)


def test_room(model):
    """A request waits until all that it may write has room, and one that never will is refused."""
    with wf.Engine(model, cache=model.make_cache(max_tokens=96), prefill_chunk=32) as engine:
        with pytest.raises(wf.InputError, match=r"80 tokens that may become 100 has no room .* = 96"):
            engine.submit(prompt_of(80), max_new_tokens=20)
        prompts = [prompt_of(40) for _ in range(5)]
        requests = [engine.submit(prompt, max_new_tokens=20, **OPTIONS) for prompt in prompts]
        for prompt, request in zip(prompts, requests, strict=True):
            assert request.result(60) == alone(model, prompt, max_new_tokens=20)
        prefix = engine.prefix(prompt_of(40))
        assert engine.submit([7], prefix=prefix, max_new_tokens=4, **OPTIONS).result(60).tokens
        with pytest.raises(CacheFull, match="prefixes leave"):
            engine.submit(prompt_of(60), max_new_tokens=10).result(60)


def test_ends(model):
    prompt = prompt_of(6)
    endless = dict(max_new_tokens=400, eos_token_id=None, suppress_tokens=EOS)
    engine = wf.Engine(model)
    request = engine.submit(prompt, **endless)
    assert next(iter(request)) >= 0
    with pytest.raises(TimeoutError):
        request.result(0)
    request.cancel()
    tokens, reason = request.result(60)
    assert (reason, [*request]) == ("cancelled", tokens)
    stopped = engine.submit(prompt, stopping_criteria=lambda ids, _: ids.shape[1] >= 9, **endless)
    assert (len(stopped.result(60).tokens), stopped.result().reason) == (3, "stop")

    def fails(token):
        raise OSError("a client is gone")

    with pytest.raises(OSError, match="a client is gone"):
        engine.submit(prompt, on_token=fails, **endless).result(60)
    waits = engine.submit(prompt, **endless)
    engine.close(cancel=True)
    assert waits.result(0).reason == "cancelled"
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(prompt)
    check_empty(engine)


def test_an_exception_in_the_block_cancels(model):
    engine = wf.Engine(model)
    request = engine.submit(prompt_of(3), max_new_tokens=400, eos_token_id=None, suppress_tokens=EOS)
    engine.__exit__(KeyboardInterrupt, None, None)
    assert request.result(0).reason == "cancelled"
    check_empty(engine)


def test_the_model_raises():
    model = make_llama()
    forward, prompt = model.backbone.forward_rows, prompt_of(5)
    with wf.Engine(model) as engine:
        expected = engine.submit(prompt, max_new_tokens=30, **OPTIONS).result(60)
        model.backbone.forward_rows = lambda *args, **options: 1 / 0
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                engine.submit(prompt, max_new_tokens=30, **OPTIONS).result(60)
        model.backbone.forward_rows = forward
        assert engine.submit(prompt, max_new_tokens=30, **OPTIONS).result(60) == expected
    check_empty(engine)


def test_a_long_prefix_stops_nobody(model):
    """It is read in chunks, beside the tokens of the others."""
    calls, order = [], []
    forward = model.backbone.forward_rows

    def watched(ids, mask=None, *args, **options):
        calls.append(ids.numel() if mask is None else int(mask.sum()))
        return forward(ids, mask, *args, **options)

    system = prompt_of(200)
    model.backbone.forward_rows = watched
    try:
        with wf.Engine(model, prefill_chunk=16) as engine:
            endless = dict(max_new_tokens=400, eos_token_id=None, suppress_tokens=EOS)
            first = engine.submit(prompt_of(4), on_token=lambda _: order.append("first"), **endless)
            next(iter(first))
            second = engine.submit(
                [7], prefix=engine.prefix(system), on_token=lambda _: order.append("second"), **OPTIONS
            )
            found = second.result(60)
            first.cancel()
    finally:
        del model.backbone.forward_rows
    assert max(calls) <= 16
    assert order.index("second") >= 200 // 16
    assert found == alone(model, torch.cat([system, torch.tensor([7])]))
    check_empty(engine)


def test_a_half_read_prefix_is_read_on(model):
    """By the next request, where the first one is cancelled; what is read is not counted against it."""
    system, begun, goes_on = prompt_of(64), threading.Event(), threading.Event()
    engine = wf.Engine(model, cache=model.make_cache(max_tokens=4 * 32), prefill_chunk=32)
    forward, calls = model.backbone.forward_rows, []

    def watched(ids, *args, **options):
        calls.append(ids.numel())
        found = forward(ids, *args, **options)
        if len(calls) == 1:
            begun.set()
            goes_on.wait(60)
        return found

    model.backbone.forward_rows = watched
    try:
        prefix = engine.prefix(system)
        first = engine.submit([7], prefix=prefix, max_new_tokens=32, **OPTIONS)
        assert begun.wait(60)
        first.cancel()
        second = engine.submit([9], prefix=prefix, max_new_tokens=32, **OPTIONS)
        goes_on.set()
        found = second.result(60)
    finally:
        del model.backbone.forward_rows
        engine.close()
    assert first.result(0) == ([], "cancelled")
    assert calls[:3] == [32, 32, 1]
    assert found == alone(model, torch.cat([system, torch.tensor([9])]), max_new_tokens=32)
    check_empty(engine)


def test_a_prefix_is_of_one_engine(model):
    with wf.Engine(model) as engine, wf.Engine(model) as other:
        prefix = engine.prefix([3, 4])
        with pytest.raises(wf.InputError, match="the prefix is of another Engine"):
            other.submit([5], prefix=prefix)


def test_the_engine_does_not_wait_for_itself(model):
    """Its thread makes the room in the queue that `submit` would wait for."""
    with wf.Engine(model, max_batch=1, max_waiting=1) as engine:

        def more(token):
            for _ in range(2):
                engine.submit([3], max_new_tokens=1, **OPTIONS)

        with pytest.raises(queue.Full, match="1 requests are waiting"):
            engine.submit([3], max_new_tokens=1, on_token=more, **OPTIONS).result(20)


def test_memory_is_flat():
    model = make_llama(layers=1)
    with wf.Engine(model, max_batch=64, max_waiting=64, prefill_chunk=256) as engine:

        def serve(count):
            last = None
            for i in range(count):
                last = engine.submit([3 + i % 50, 7], max_new_tokens=2, **OPTIONS)
            last.result(60)
            gc.collect()

        serve(1000)
        objects, pages = len(gc.get_objects()), resident_pages()
        serve(9000)
        assert len(gc.get_objects()) - objects < 900
        assert (resident_pages() - pages) * resource.getpagesize() < 8e6
        # A block of each that runs and of each that begins, doubled where there were none left.
        assert engine.cache.tables[None].pool.capacity <= 2 * (2 * 64 + 1)
    check_empty(engine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "is not"),
        ({"input_ids": [3, 99]}, r"input_ids has \[99\]"),
        ({"input_ids": [[3]]}, r"input_ids = torch.int64 \[1, 1\] is not \[T\]"),
        ({"num_beams": 2}, "num_beams = 2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences = 2"),
        ({"temperature": -1.0, "do_sample": True}, "temperature = -1.0"),
        ({"eos_token_id": 60}, "eos_token_id = 60 is not in the vocabulary of 60"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is not of an Engine"),
        ({"stop_strings": "x"}, "stop_strings need a tokenizer"),
    ],
    ids=str,
)
def test_bad_requests(model, arguments, message):
    with wf.Engine(model) as engine, pytest.raises(wf.InputError, match=message):
        engine.submit(**{"input_ids": [3]} | arguments)


def test_bad_engines(model):
    with pytest.raises(wf.InputError, match=r"max_batch = 0 is not 1, 2\.\.\."):
        wf.Engine(model, max_batch=0)
    cache = model.make_cache()
    cache.add_(1)
    with pytest.raises(wf.InputError, match="the cache holds 1 sequences"):
        wf.Engine(model, cache=cache)
