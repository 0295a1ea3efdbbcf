import copy
from collections import OrderedDict

import pytest
import torch
import transformers
from torch import nn

import warpformer as wf
from tests.check import relative_error, same_bits
from warpformer.ops._quantized import FORMATS
from warpformer.quantization import dequantize, quantize

MODES = {
    "int8": 0.01,
    "int8_dynamic": 0.01,
    "int4": 0.12,
    "int4_dynamic": 0.12,
    "nf4": 0.11,
}  # error of weights


def network():
    """64 -> 48 -> 64: a torch layer, one of ours, and one inside a block."""
    block = nn.Sequential(nn.ReLU(), nn.Linear(48, 64))
    return nn.Sequential(
        OrderedDict(first=nn.Linear(64, 48), second=wf.nn.PackedLinear(48, 48, bias=False), block=block)
    )


def names(report):
    return {row.name: row.note for row in report}


def layers(model):
    return {name: module for name, module in model.named_modules()}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    model = network().eval()
    before, bias = copy.deepcopy(model), model.first.bias
    x = torch.randn(200, 64)
    group_size = -1 if mode == "int8_dynamic" else 32
    report = wf.quantize_(model, mode, group_size)
    assert [row.name for row in report] == ["first", "second", "block.1"]
    for row in report:
        layer, weight = model.get_submodule(row.name), before.get_submodule(row.name).weight.detach()
        assert type(layer) is (wf.nn.Int8Linear if mode.startswith("int8") else wf.nn.Int4Linear)
        assert layer.format == mode
        assert not layer.training
        assert row.shape == weight.shape
        assert row.bytes_before == weight.nbytes
        assert row.bytes_after == layer.packed.nbytes < row.bytes_before
        assert row.error == pytest.approx(relative_error(layer.weight, weight))
        assert row.error < MODES[mode]
        assert row.note == ""
        assert same_bits(layer.weight, dequantize(quantize(weight, mode, group_size)))
    assert model.first.bias is bias
    with torch.no_grad():
        assert relative_error(model(x), before(x).double()) < 3 * MODES[mode]


def test_options():
    model = network()
    weight = model.first.weight.detach()
    wf.quantize_(model, "int4", 64, clip="mse", zero_points=True)
    expected = quantize(weight, "int4", 64, clip="mse", zero_points=True)
    assert torch.equal(model.first.quantized_weight.values, expected.values)
    assert (model.first.group_size, model.first.zero_points) == (64, True)
    model = network()
    wf.quantize_(model, "nf4", -1)
    assert (model.first.group_size, model.block[1].group_size) == (64, 48)
    model = network()
    wf.quantize_(model, "int8", 32)
    assert (model.first.group_size, model.block[1].group_size) == (32, 32)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), set()),
        ("first", {"first"}),
        (["first", "block.*"], {"first", "block.1"}),
        ("*", {"first", "second", "block.1"}),
        ("bloc?.1", {"block.1"}),
        ("block", set()),
        (lambda name, layer: layer.in_features == 48, {"second", "block.1"}),
    ],
)
def test_skip(skip, left):
    model = network()
    before = layers(model)
    report = wf.quantize_(model, "int8", skip=skip)
    assert {name for name, note in names(report).items() if note == "skipped"} == left
    assert {name for name, module in layers(model).items() if module is before[name]} >= left
    assert all(row.bytes_after == row.bytes_before for row in report if row.name in left)
    assert len(report) == 3


def test_a_layer_that_fails_leaves_the_model_as_it_was():
    model = network()
    with torch.no_grad():
        model.block[1].weight[3, 5] = torch.nan
    before = layers(model)
    with pytest.raises(wf.InputError, match=r"block\.1: quantize: weight = float32\[64, 48\] has NaN or Inf"):
        wf.quantize_(model, "int8")
    assert layers(model) == before


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("int7",), {}, "mode = 'int7' is none of"),
        (("int4", 48), {}, r"first: group_size = 48 of int4"),
        (("int8_dynamic", 32), {}, r"first: group_size = 32 of int8_dynamic"),
        (("int4",), {"clip": "max"}, "clip = 'max'"),
        (("nf4",), {"zero_points": True}, "first: zero_points: nf4"),
        (("int8",), {"skip": [3]}, r"skip = \[3\] is neither names nor a function"),
    ],
)
def test_bad_options(arguments, options, message):
    model = network()
    before = layers(model)
    with pytest.raises(wf.InputError, match=message):
        wf.quantize_(model, *arguments, **options)
    assert layers(model) == before


def test_weights_of_another_dtype():
    with pytest.raises(wf.InputError, match=r"first: quantize: weight = float64\[48, 64\] is no"):
        wf.quantize_(nn.Sequential(OrderedDict(first=nn.Linear(64, 48).double())), "int8")


def test_the_model_itself_cannot_be_replaced():
    for model in (nn.Linear(4, 4), wf.nn.PackedLinear(4, 4)):
        with pytest.raises(wf.InputError, match="itself a linear layer"):
            wf.quantize_(model, "int8")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids))


def test_tied_weights():
    model = Tied()
    assert names(wf.quantize_(model, "int4")) == {"head": "its weight is also that of tokens"}
    assert model.head.weight is model.tokens.weight
    weight = model.tokens.weight
    assert names(wf.quantize_(model, "int4", tied=True)) == {"head": ""}
    assert model.tokens.weight is weight
    assert type(model.head) is wf.nn.Int4Linear


def test_a_layer_in_two_places():
    layer = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": nn.Sequential(layer), "b": nn.Sequential(layer)})
    assert names(wf.quantize_(model, "int8", skip="b.0")) == {"a.0": "skipped"}
    assert names(wf.quantize_(model, "int8")) == {"a.0": ""}
    assert model["a"][0] is model["b"][0]
    assert type(model["a"][0]) is wf.nn.Int8Linear


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Named(nn.Linear):
    pass


def test_which_layers():
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("plain", "hooked", "patched", "normed")})
    model["hooked"].register_forward_hook(lambda *args: None)
    model["patched"].forward = lambda input: input
    nn.utils.parametrizations.weight_norm(model["normed"])
    model.update({"scaled": Scaled(32, 32), "named": Named(32, 32), "done": wf.nn.Int8Linear(32, 32)})
    before = layers(model)
    assert names(wf.quantize_(model, "int8")) == {
        "plain": "",
        "hooked": "it has hooks",
        "patched": "its forward is not torch's",
        "normed": "its weight is parametrized",
        "named": "",
    }
    changed = {name for name, module in model.items() if module is not before[name]}
    assert changed == {"plain", "named"}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("with_padding", [False, True])
def test_torch_encoder_runs_our_kernels(with_padding):
    """Its fused path would read weights that are no longer there."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 7, 32)
    padding = torch.arange(7) >= torch.tensor([[7], [4]]) if with_padding else None
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
    report = wf.quantize_(model, "int8")
    for name, note in names(report).items():
        assert ("reads its weight" in note) == name.endswith("out_proj")
    assert type(model.layers[1].linear2) is wf.nn.Int8Linear
    calls = []
    model.layers[1].linear2.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        found = model(x, src_key_padding_mask=padding)
    assert len(calls) == 1
    kept = slice(None) if padding is None else ~padding
    assert relative_error(found[kept], expected[kept].double()) < 0.02
    copy.deepcopy(model)(x)


@pytest.mark.parametrize("name", ["Bert", "T5Encoder"])
def test_a_model_of_transformers(name):
    sizes = dict(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=90
    )
    if name == "T5Encoder":
        sizes = dict(num_layers=2, num_heads=4, d_model=32, d_ff=64, d_kv=8, vocab_size=90)
    config = getattr(transformers, f"{name.removesuffix('Encoder')}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config).eval()
    ids = torch.randint(0, 90, (3, 11))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        report = wf.quantize_(model, "int8")
        found = model(ids).last_hidden_state
    assert len(report) >= 12
    assert not any(row.note for row in report)
    assert relative_error(found, expected.double()) < 0.03


def test_layers_without_weights():
    with pytest.raises(wf.InputError, match=r"first: quantize: weight = float32\[48, 64\] meta"):
        wf.quantize_(network().to("meta"), "int8")
    with pytest.raises(wf.InputError, match="0: a LazyLinear has no weight"):
        wf.quantize_(nn.Sequential(nn.LazyLinear(32)), "int8")


def test_training_through_a_quantized_model():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    wf.quantize_(model, "int4", skip="0")
    model(torch.randn(4, 32)).square().sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    assert model[1].bias.grad.abs().sum() > 0


def test_every_mode_is_tested():
    assert MODES.keys() == set(FORMATS)
