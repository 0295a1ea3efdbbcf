"""patch_ and unpatch_: torch.nn models, and what holds of all."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import warpformer as wf
from tests.check import relative_error
from tests.process import run
from warpformer.nn._blocks import activation_name


class Small(nn.Module):
    """Every layer of torch.nn that has one of ours, in a model of the user's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, activation=F.gelu, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16))
        self.seq2seq = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Sequential(
            nn.RMSNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Dropout(), nn.Linear(24, 7)
        )
        self.gate = nn.Sequential(nn.GELU("tanh"), nn.SiLU(), nn.ReLU())

    def forward(self, x):
        x = self.encoder(x + self.embedding.weight[0] + self.embedding(x[..., 0].long().abs()))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.gate(self.seq2seq(x, x)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def x():
    return torch.randn(2, 5, 16)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_every_layer_in_place_and_back(model, x):
    before, parameters, attributes = classes(model), list(model.parameters()), set(vars(model.head[1]))
    expected, exact = model(x).detach(), gradients(model, x)
    wf.patch_(model)
    for name, module in model.named_modules():
        assert isinstance(module, before[name])
        containers = (Small, nn.Sequential, nn.ModuleList)
        assert (type(module) is before[name]) == isinstance(module, containers), name
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert relative_error(model(x).detach(), expected.double()) < 1e-5
    for name, gradient in gradients(model, x).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        assert relative_error(model(x), expected.double()) < 1e-5
    wf.unpatch_(model)
    assert classes(model) == before
    assert set(vars(model.head[1])) == attributes
    assert torch.equal(model(x), expected)


def test_padding(model, x):
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    expected = model.encoder(x, src_key_padding_mask=padding).detach()  # with gradients: no nested tensors
    wf.patch_(model)
    with torch.no_grad():
        found = model.encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


def test_the_report_says_what_became_what(model):
    report = wf.patch_(model)
    found = {change.name: change for change in report}
    assert found["head.1"] == ("head.1", "torch.nn.Linear", "warpformer.nn.Linear", "")
    assert found["attention.out_proj"].before == "torch.nn.NonDynamicallyQuantizableLinear"
    assert [line.split() for line in str(report).splitlines() if "MultiheadAttention" in line] == [
        ["6", "x", "torch.nn.MultiheadAttention", "->", "warpformer.nn.MultiheadAttention"]
    ]
    assert wf.patch_(model) == []
    assert str(wf.patch_(model)) == "nothing to patch"


def test_a_model_that_is_one_layer():
    layer = nn.Linear(3, 4)
    wf.patch_(layer)
    assert type(layer) is wf.nn.Linear
    wf.unpatch_(layer)
    assert type(layer) is nn.Linear


def test_layers_of_ours_are_no_change():
    model = nn.Sequential(wf.nn.Linear(3, 4))
    assert wf.patch_(model) == []
    wf.unpatch_(model)
    assert type(model[0]) is wf.nn.Linear


def test_hooks_fire_and_are_the_ones_they_were(model, x):
    calls = []

    def note(module, *_):
        calls.append(module)

    for name in ("encoder.layers.0.linear1", "encoder.layers.0.norm1", "head.1", "head.2", "attention"):
        model.get_submodule(name).register_forward_hook(note)
    for _ in range(2):  # with gradients, and in torch's order without
        with torch.inference_mode():
            expected = model(x)
        order, calls[:] = list(calls), []
        wf.patch_(model)
        assert relative_error(model(x).detach(), expected.double()) < 1e-5
        assert calls == order
        calls.clear()
        wf.unpatch_(model)


def test_optimizers_go_on(model, x):
    other = copy.deepcopy(model)
    steps = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(other.parameters(), 0.1)
    wf.patch_(model)
    for _ in range(3):
        for each, step in zip((model, other), steps, strict=True):
            step.zero_grad()
            each(x).square().mean().backward()
            step.step()
    with torch.no_grad():
        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)


def test_copies_and_files(model, x):
    wf.patch_(model)
    with torch.no_grad():
        expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    for each in copies:
        assert classes(each) == classes(model)
        with torch.no_grad():
            assert torch.equal(each(x), expected)
        wf.unpatch_(each)
        assert {type(m).__module__.split(".")[0] for m in each.modules()} == {"torch", "tests"}


def test_state_dicts_are_torchs(model, x):
    theirs = copy.deepcopy(model)
    wf.patch_(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
        theirs.load_state_dict(model.state_dict())
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
        for parameter in theirs.parameters():
            parameter.mul_(0.9)
        model.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


class Doubling(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    """A Linear of the user's with attributes, no other computation."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.tag = "mine"


class Hidden(nn.MultiheadAttention):
    def merge_masks(self, *masks):
        return super().merge_masks(*masks)


def test_what_is_not_torchs_own_is_left_alone_and_said():
    replaced = nn.Linear(3, 3)
    replaced.forward = torch.tanh
    model = nn.Sequential(
        *(Doubling(3, 3), Hidden(4, 2), parametrizations.weight_norm(nn.Linear(3, 3)), replaced),
        *(nn.LazyLinear(3), nn.Linear(3, 3).double()),
    )
    before = classes(model)
    report = {c.name: c for c in wf.patch_(model) if not c.name.endswith("out_proj")}
    assert {name: cls for name, cls in classes(model).items() if "out_proj" not in name} == {
        name: cls for name, cls in before.items() if "out_proj" not in name
    }
    assert {name: c.reason for name, c in report.items()} == {
        "0": "its class has its own forward",
        "1": "its class has its own merge_masks",
        "2": "it is parametrized",
        "3": "its forward was replaced",
        "4": "it has no parameters before its first call",
        "5": "its parameters are torch.float64",
    }
    assert all(c.after == "" for c in report.values())
    assert "left alone: it is parametrized" in str(wf.patch_(model))


def test_subclasses_that_compute_the_same_stay_of_their_class():
    model = Named(3, 4)
    expected = model(torch.ones(2, 3))
    wf.patch_(model)
    assert isinstance(model, Named)
    assert isinstance(model, wf.nn.Linear)
    assert model.tag == "mine"
    torch.testing.assert_close(model(torch.ones(2, 3)), expected)
    for each in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert type(each) is type(model)
        assert each.tag == "mine"
    wf.unpatch_(model)
    assert type(model) is Named


def test_activations_are_fused_where_they_were():
    layer = nn.TransformerEncoderLayer(16, 4, 32, activation=nn.GELU("tanh"))
    wf.patch_(layer)
    assert activation_name(layer.activation) == "gelu_tanh"


def test_activations_in_place_stay():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.SiLU(inplace=True))
    assert wf.patch_(model) == []


def test_shared_modules_are_one():
    layer = nn.Linear(3, 3)
    model = nn.ModuleList([layer, layer])
    assert len(wf.patch_(model)) == 1
    assert type(layer) is wf.nn.Linear
    wf.unpatch_(model)
    assert type(layer) is nn.Linear


def test_patched_models_are_quantized(model, x):
    wf.patch_(model)
    with torch.no_grad():
        expected = model(x)
        notes = {row.note for row in wf.quantize_(model, "int8")}
        assert notes == {""}
        assert relative_error(model(x), expected.double()) < 0.05
    before = classes(model)
    with pytest.raises(wf.InputError, match="no quantized projections"):
        wf.unpatch_(model)
    assert classes(model) == before


def test_unpatched_layers_keep_quantized_ones(model, x):
    wf.patch_(model)
    wf.quantize_(model, "int8", skip=["*attn*", "attention.*"])
    with torch.no_grad():
        expected = model(x)
        wf.unpatch_(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.encoder.layers[0].linear1) is wf.nn.Int8Linear


def test_compiles_without_a_break(model, x):
    torch.compiler.reset()
    wf.patch_(model)
    expected = model(x)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_torch_model_needs_no_transformers():
    script = """
        import sys, torch, warpformer as wf
        model = torch.nn.Linear(3, 3)
        print(wf.patch_(model), "transformers" in sys.modules)
    """
    assert run(script).split() == ["1", "x", "torch.nn.Linear", "->", "warpformer.nn.Linear", "False"]
