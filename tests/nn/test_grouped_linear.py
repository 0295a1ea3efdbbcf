"""GroupedLinear, PackedGroupedLinear and QuantizedGroupedLinear."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import warpformer as wf
from tests.check import relative_error, same_bits
from warpformer.quantization import dequantize, quantize
from warpformer.quantization.config import prepare_model, quantization_config

EXPERTS, K, N = 3, 70, 32
OFFSETS = torch.tensor([4, 4, 11])
FORMATS = [
    ("int8", {}),
    ("int8_dynamic", {}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 64, "zero_points": True}),
    ("int4_dynamic", {"group_size": -1}),
    ("nf4", {"group_size": 32}),
]


PARTS = [None, {"w1": N // 2, "w3": N // 2}, {"w2": N}]


def by_expert(x, weight, bias, activation="none"):
    parts = zip(x.tensor_split(OFFSETS[:-1].tolist()), weight, bias, strict=True)
    return torch.cat([wf.ops.linear(*each, activation=activation) for each in parts])


def has_cuda_kernel(params):
    return "format" in params


@pytest.mark.parametrize("cls", [wf.nn.GroupedLinear, wf.nn.PackedGroupedLinear])
@torch.no_grad()
def test_each_expert_is_a_linear(dtype, cls):
    layer, x = cls(EXPERTS, K, N, dtype=dtype), torch.randn(11, K, dtype=dtype)
    expected = by_expert(x, layer.weight, layer.bias, "relu")
    assert same_bits(layer(x, OFFSETS, "relu"), expected)
    assert layer.num_experts == EXPERTS


def test_starts_as_torch_does():
    layer = wf.nn.GroupedLinear(500, 9, 16)
    for parameter in layer.parameters():
        assert parameter.abs().max() <= 1 / 3
        assert parameter.std().item() == pytest.approx(1 / 3 / 3**0.5, rel=0.05)
    repr_ = "num_experts=500, in_features=9, out_features=16, bias=True, gated=False"
    assert repr(layer) == f"GroupedLinear({repr_})"


@pytest.mark.parametrize("bias", [False, True])
def test_a_gate_is_the_same_with_gradients_and_packed(bias):
    layer, x = wf.nn.GroupedLinear(EXPERTS, K, N, bias, gated=True), torch.randn(11, K)
    packed = wf.nn.PackedGroupedLinear(EXPERTS, K, N, bias, gated=True)
    packed.load_state_dict(layer.state_dict())
    out = layer(x, OFFSETS, "silu")
    out.sum().backward()
    assert layer.weight.grad[0].any()
    assert not layer.weight.grad[1].any()
    with torch.no_grad():
        assert same_bits(packed(x, OFFSETS, "silu"), layer(x, OFFSETS, "silu"))
    torch.testing.assert_close(out, packed(x, OFFSETS, "silu"))


def layers(parts, bias=True, **options):
    yield wf.nn.GroupedLinear(EXPERTS, K, N, bias, parts=parts, **options)
    yield wf.nn.PackedGroupedLinear(EXPERTS, K, N, bias, parts=parts, **options)
    for format, quantization in FORMATS:
        layer = quantized(
            quantize(torch.randn(EXPERTS, N, K), format, **quantization), bias, parts, **options
        )
        yield layer


def quantized(weight, bias=True, parts=None, **options):
    bias = nn.Parameter(torch.randn(EXPERTS, N)) if bias else None
    return wf.nn.QuantizedGroupedLinear.from_quantized(weight, bias, parts=parts, **options)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict(parts, bias):
    for layer in layers(parts, bias):
        state = layer.state_dict()
        assert {key: tuple(t.shape) for key, t in state.items()} == {
            key: shape for key, (shape, _) in layer.state_layout().items()
        }
        names = [""] if parts is None else [f"{e}.{part}." for e in range(EXPERTS) for part in parts]
        kinds = {key.rpartition(".")[2] for key in state}
        assert state.keys() == {name + kind for name in names for kind in kinds}
        for assign in (False, True):
            other = copy.deepcopy(layer)
            for parameter in other.parameters():
                nn.init.zeros_(parameter)
            if isinstance(other, wf.nn.PackedGroupedLinear):
                other.pack(torch.zeros(EXPERTS, N, K))
            other.load_state_dict(state, assign=assign)
            assert same_bits(other.weight.detach(), layer.weight.detach())
            assert bias == (other.bias is not None)
            if bias:
                assert same_bits(other.bias.detach(), layer.bias.detach())


def test_a_checkpoint_of_single_experts(dtype):
    """That of Mixtral."""
    state = {
        f"{e}.{part}.weight": torch.randn(N // 2, K, dtype=dtype)
        for e in range(EXPERTS)
        for part in ("w1", "w3")
    }
    weight = torch.stack(
        [torch.cat([state[f"{e}.w1.weight"], state[f"{e}.w3.weight"]]) for e in range(EXPERTS)]
    )
    with torch.device("meta"):
        options = {"bias": False, "gated": True, "parts": PARTS[1]}
        layers = [cls(EXPERTS, K, N, **options) for cls in (wf.nn.GroupedLinear, wf.nn.PackedGroupedLinear)]
    for layer in layers:
        layer.load_state_dict(state, assign=True)
        assert same_bits(layer.weight.detach(), weight)
        assert layer.state_dict().keys() == state.keys()
    assert isinstance(layers[0].weight, nn.Parameter)
    assert layers[0].weight.requires_grad


def test_one_expert_with_a_name():
    layer = wf.nn.GroupedLinear(1, K, N, bias=False, parts={"w2": N})
    state = layer.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {"0.w2.weight": (N, K)}
    layer.load_state_dict(state)


def test_errors_of_a_state_dict():
    layer = wf.nn.GroupedLinear(2, 4, 6, bias=False, parts={"w1": 3, "w3": 3})
    state = layer.state_dict()
    state["1.w3.weight"], state["2.w1.weight"] = torch.zeros(3, 5), state.pop("0.w1.weight")
    with pytest.raises(RuntimeError) as info:
        layer.load_state_dict(state)
    for message in (
        "1.w3.weight has shape [3, 5], not [3, 4]",
        'Missing key(s) in state_dict: "0.w1.weight"',
        'Unexpected key(s) in state_dict: "2.w1.weight"',
    ):
        assert message in str(info.value)


def test_loading_keeps_the_parameter_and_an_optimizer_its_hold():
    layer, x = wf.nn.GroupedLinear(EXPERTS, K, N, parts={"a": N}), torch.randn(11, K)
    weight = layer.weight
    with torch.no_grad():
        before = layer(x, OFFSETS)
        layer.load_state_dict({key: 2 * value for key, value in layer.state_dict().items()})
        assert layer.weight is weight
        assert same_bits(layer(x, OFFSETS), 2 * before)


@pytest.mark.parametrize(("format", "options"), FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_quantized(device, format, options, gated):
    weight, x = torch.randn(EXPERTS, N, K), torch.randn(11, K)
    layer = quantized(quantize(weight, format, **options), gated=gated)
    out = layer(x, OFFSETS.to(device), "silu")
    expected, exact = [], []
    for e, rows in enumerate(x.tensor_split(OFFSETS[:-1].tolist())):
        packed = wf.ops.pack_linear(quantize(weight[e], format, **options), gated=gated)
        expected.append(wf.ops.linear(rows, packed, layer.bias[e], activation="silu"))
        z = F.linear(rows.double(), layer.weight[e].double(), layer.bias[e].double())
        exact.append(F.silu(z[:, : N // 2]) * z[:, N // 2 :] if gated else F.silu(z))
    assert same_bits(out, torch.cat(expected))
    if not format.endswith("dynamic"):
        assert relative_error(out, torch.cat(exact)) < 1e-4


def test_quantize_stacks_experts():
    weight = torch.randn(EXPERTS, N, 75)
    for format, options in FORMATS:
        together = quantize(weight, format, **options)
        each = [quantize(of_expert, format, **options) for of_expert in weight]
        for name in ("values", "scales", "zeros"):
            parts = [getattr(part, name) for part in each]
            assert parts[0] is None or torch.equal(getattr(together, name), torch.stack(parts))
        assert same_bits(dequantize(together), torch.stack([dequantize(part) for part in each]))


def test_of_experts_or_not():
    two, three = quantize(torch.randn(N, K), "int8"), quantize(torch.randn(EXPERTS, N, K), "int8")
    with pytest.raises(wf.InputError, match=r"Int8Linear: values = int8\[3, 32, 70\] have not 2 dim"):
        wf.nn.Int8Linear.from_quantized(three)
    with pytest.raises(
        wf.InputError, match=r"QuantizedGroupedLinear: values = int8\[32, 70\] have not 3 dim"
    ):
        wf.nn.QuantizedGroupedLinear.from_quantized(two)


@pytest.mark.parametrize("cls", [wf.nn.GroupedLinear, wf.nn.PackedGroupedLinear])
def test_quantize_(cls):
    options = {"gated": True, "parts": PARTS[1]}
    model = nn.ModuleDict({"up": cls(EXPERTS, K, N, **options), "down": cls(EXPERTS, N, K, bias=False)})
    up, down = model["up"], model["down"]
    report = wf.quantize_(model, "int4", 32, skip="down")
    assert [(row.name, row.shape, row.note) for row in report] == [
        ("up", (EXPERTS, N, K), ""),
        ("down", (EXPERTS, K, N), "skipped"),
    ]
    layer = model["up"]
    assert type(layer) is wf.nn.QuantizedGroupedLinear
    assert (layer.format, layer.group_size, layer.gated, layer.parts) == ("int4", 32, True, PARTS[1])
    assert layer.bias is up.bias
    assert model["down"] is down
    expected = dequantize(quantize(up.weight, "int4", 32))
    assert same_bits(layer.weight, expected)
    assert report[0].error == pytest.approx(((expected - up.weight).norm() / up.weight.norm()).item())
    assert 0.05 < report[0].error < 0.2


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_in_the_config_of_a_checkpoint(format, options):
    model = nn.ModuleDict({"up": wf.nn.GroupedLinear(EXPERTS, K, N, gated=True, parts=PARTS[1])})
    wf.quantize_(model, format, **options)
    with torch.device("meta"):
        other = nn.ModuleDict({"up": wf.nn.GroupedLinear(EXPERTS, K, N, gated=True, parts=PARTS[1])})
    prepare_model(other, quantization_config(model))
    other.load_state_dict(model.state_dict(), assign=True)
    x = torch.randn(11, K)
    assert same_bits(other["up"](x, OFFSETS, "silu"), model["up"](x, OFFSETS, "silu"))


@pytest.mark.parametrize("parts", PARTS)
def test_copies(parts):
    x = torch.randn(11, K)
    for layer in layers(parts, gated=True):
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
            assert same_bits(other(x, OFFSETS, "silu").detach(), layer(x, OFFSETS, "silu").detach())


def test_conversion_of_the_dtype():
    layer = wf.nn.PackedGroupedLinear(EXPERTS, K, N, gated=True)
    weight = layer.weight
    layer.bfloat16()
    assert same_bits(layer.weight, weight.bfloat16())
    assert layer.bias.dtype == torch.bfloat16
