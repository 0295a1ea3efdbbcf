"""Models of transformers give patched what they give unpatched."""

import copy
import pickle

import pytest
import torch

import warpformer as wf
from tests.integrations.models import MODELS, batch, make
from warpformer import ops

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


def test_experts_train_in_grouped_products(monkeypatch):
    model, calls = make("mixtral"), []
    wf.patch_(model)

    def product(*args, _product=ops.grouped_linear, **options):
        calls.append(options)
        return _product(*args, **options)

    monkeypatch.setattr(ops, "grouped_linear", product)
    call(model.train(), batch()).loss.backward()
    assert len(calls) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_greedy_tokens(decoders, cache, padding):
    inputs = batch(padding)
    theirs, ours = (
        model.generate(inputs.ids, attention_mask=inputs.mask, cache_implementation=cache)
        for model in decoders
    )
    assert torch.equal(ours, theirs)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def test_unpatched_it_is_what_it_was(pair):
    theirs, patched = pair
    ours = copy.deepcopy(patched)
    wf.unpatch_(ours)
    assert classes(ours) == classes(theirs)
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    inputs = batch("right")
    with torch.no_grad():
        found, expected = call(ours, inputs), call(theirs, inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_files_are_those_of_an_unpatched_model(pair, tmp_path):
    for name, model in zip(("theirs", "ours"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
    files = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == files
    for file in files:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_copies_stay_patched(pair):
    ours, inputs = pair[1], batch("right")
    with torch.no_grad():
        expected = call(ours, inputs).logits
        for each in copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)):
            assert classes(each) == classes(ours)
            assert torch.equal(call(each, inputs).logits, expected)


def test_nothing_is_left_alone_but_embeddings_with_a_forward_of_their_own(pair):
    report = wf.patch_(copy.deepcopy(pair[0]))
    left = [c for c in report if c.reason]
    assert all(c.before.endswith("Embedding") for c in left)
    assert {c.reason for c in left} <= {"its class has its own forward"}
    attention = f"{pair[0].config._attn_implementation} attention"
    assert {"torch.nn.Linear", attention} <= {c.before for c in report}
    assert wf.patch_(copy.deepcopy(pair[1])) == left


def test_quantized(pair):
    theirs, ours = copy.deepcopy(pair)
    inputs = batch("right")
    for model in (theirs, ours):
        wf.quantize_(model, "int8")
    with torch.no_grad():
        expected, found = (call(model, inputs).logits[inputs.mask == 1] for model in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hooks_fire_where_neighbours_are_fused():
    model, inputs, calls = make("bert"), batch("right"), []
    wf.patch_(model)
    layer = model.bert.encoder.layer[0]
    parts = (layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.LayerNorm)
    with torch.no_grad():
        expected = call(model, inputs).logits
        for part in parts:
            part.register_forward_hook(lambda module, *_: calls.append(module))
        torch.testing.assert_close(call(model, inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert calls == list(parts)


def test_what_asks_for_attention_weights_keeps_its_attention():
    model = make("bert", "eager")
    model.config.output_attentions = True
    reasons = {change.before: change.reason for change in wf.patch_(model) if change.reason}
    assert reasons == {"eager attention": "config.output_attentions asks for its weights"}
    assert model(batch().ids).attentions[0].shape == (3, 4, 14, 14)


def test_a_loss_of_the_users_stays():
    model = make("llama")
    model.loss_function = own = lambda **_: None
    assert [c.reason for c in wf.patch_(model) if c.reason] == ["the model has a loss_function of its own"]
    wf.unpatch_(model)
    assert model.loss_function is own


def test_bfloat16_is_as_exact(pair):
    """For the median token: the last bits send some to another expert."""
    inputs, errors = batch(rows=64), []
    with torch.no_grad():
        exact = call(pair[0], inputs).logits
        for model in pair:
            out = call(copy.deepcopy(model).bfloat16(), inputs).logits
            errors.append(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "llama"])
def test_trains_under_autocast_with_checkpointing(name):
    inputs, losses = batch("right"), []
    for patched in (False, True):
        model = make(name)
        if patched:
            wf.patch_(model)
        model.train()
        for each in model.modules():
            if isinstance(each, torch.nn.Dropout):
                each.p = 0.0
        model.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = call(model, inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


def test_compiles_without_a_break(pair):
    torch.compiler.reset()
    ours, inputs = pair[1], batch("right")
    decoder = {"decoder_input_ids": inputs.ids} if ours.config.is_encoder_decoder else {}
    arguments = {"input_ids": inputs.ids, "attention_mask": inputs.mask, **decoder}
    if hasattr(ours, "generate"):
        arguments["use_cache"] = False
    with torch.no_grad():
        expected = ours(**arguments).logits
        found = torch.compile(ours, fullgraph=True, backend="aot_eager")(**arguments).logits
    torch.testing.assert_close(found[inputs.mask == 1], expected[inputs.mask == 1], rtol=1e-4, atol=1e-4)
