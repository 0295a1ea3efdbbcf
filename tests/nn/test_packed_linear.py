import copy
import io
import sys

import pytest
import torch
from torch import nn

import warpformer as wf
from tests.check import same_bits

PARTS = {"query": 5, "key": 4, "value": 3}


@pytest.fixture(params=["packed", "plain"], autouse=True)
def kind(request, monkeypatch):
    """On a GPU weights are plain, and products torch's."""
    if request.param == "plain":
        monkeypatch.setattr(sys.modules["warpformer.ops.linear"], "multiplies_by_torch", lambda t: True)


@pytest.mark.parametrize("bias", [True, False])
def test_has_the_state_dict_of_torch(device, dtype, bias):
    theirs = nn.Linear(33, 21, bias=bias, dtype=dtype)
    ours = wf.nn.PackedLinear(33, 21, bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert same_bits(ours.weight, theirs.weight.detach())
    x = torch.randn(2, 7, 33, dtype=dtype)
    torch.testing.assert_close(ours(x), theirs(x).detach())
    assert repr(ours) == f"Packed{theirs}"


def test_parts(dtype):
    layer = wf.nn.PackedLinear(5, 12, dtype=dtype, parts=PARTS)
    state = layer.state_dict()
    assert [*state] == [f"{part}.{kind}" for kind in ("weight", "bias") for part in PARTS]
    assert same_bits(torch.cat([state[f"{part}.weight"] for part in PARTS]), layer.weight)
    other = wf.nn.PackedLinear(5, 12, dtype=dtype, parts=PARTS)
    other.load_state_dict(state)
    assert same_bits(other.weight, layer.weight)
    assert same_bits(other.bias, layer.bias)


def test_conversion_of_the_dtype():
    layer = wf.nn.PackedLinear(20, 30)
    weight = layer.weight
    layer.bfloat16()
    assert same_bits(layer.weight, weight.bfloat16())
    assert layer.bias.dtype == torch.bfloat16
    layer.load_state_dict(
        {"weight": weight, "bias": torch.ones(30)}
    )  # as torch has it: the layer's dtype stays
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    layer.load_state_dict({"weight": weight, "bias": torch.ones(30)}, assign=True)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32


def test_copies(dtype):
    layer = wf.nn.PackedLinear(20, 30, dtype=dtype)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert same_bits(other.weight, layer.weight)
        assert other.packed.data_ptr() != layer.packed.data_ptr()


def test_meta_device():
    with torch.device("meta"):
        layer = wf.nn.PackedLinear(20, 30)
    assert layer.packed.is_meta
    state = nn.Linear(20, 30, dtype=torch.bfloat16).state_dict()
    layer.load_state_dict(state, assign=True)
    assert same_bits(layer.weight, state["weight"])


def test_errors_of_a_state_dict():
    layer = wf.nn.PackedLinear(4, 6, parts={"a": 3, "b": 3})
    before = layer.weight
    state = {
        "a.weight": torch.zeros(3, 5),
        "b.weight": torch.zeros(3, 4).int(),
        "a.bias": torch.zeros(3),
        "c": before,
    }
    with pytest.raises(RuntimeError) as info:
        layer.load_state_dict(state)
    for message in (
        r"a.weight has shape [3, 5], not [3, 4]",
        r"b.weight has dtype torch.int32, not torch.float32 or torch.bfloat16 or torch.float16",
        'Missing key(s) in state_dict: "b.bias"',
        'Unexpected key(s) in state_dict: "c"',
    ):
        assert message in str(info.value)
    assert same_bits(layer.weight, before)


def test_activation_and_residual():
    layer, x, residual = wf.nn.PackedLinear(16, 16), torch.randn(3, 16), torch.randn(3, 16)
    expected = torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias)) + residual
    torch.testing.assert_close(layer(x, activation="relu", residual=residual), expected)


@pytest.mark.parametrize("width", [16, 20])
def test_the_gate_and_what_is_before_it(width):
    layer, x = wf.nn.PackedLinear(16, 2 * width, gated=True), torch.randn(3, 16)
    before = torch.nn.functional.linear(x, layer.weight, layer.bias)
    gate, up = before.chunk(2, -1)
    torch.testing.assert_close(layer(x, activation="silu"), torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(layer.before_gate(x, residual=before), 2 * before)


def test_some_rows():
    layer, x = wf.nn.PackedLinear(20, 48), torch.randn(3, 20)
    for begin, end in ((0, 16), (16, 40), (3, 9)):
        torch.testing.assert_close(layer.forward_rows(x, begin, end), layer(x)[:, begin:end])


def test_the_table_of_an_embedding():
    layer, ids = wf.nn.PackedLinear(20, 30, bias=False), torch.tensor([[3, 0], [29, 3]])
    assert same_bits(wf.nn.PackedEmbedding(layer)(ids), layer.weight[ids])


@pytest.mark.parametrize("gated", [False, True])
def test_gradient_of_the_input(gated):
    layer, x = wf.nn.PackedLinear(20, 40, gated=gated), torch.randn(3, 20, requires_grad=True)
    out = layer(x, activation="silu")
    z = torch.nn.functional.linear(x, layer.weight, layer.bias)
    expected = torch.nn.functional.silu(z[:, :20]) * z[:, 20:] if gated else torch.nn.functional.silu(z)
    grad = torch.randn_like(out)
    found, truth = (torch.autograd.grad(y, x, grad)[0] for y in (out, expected))
    torch.testing.assert_close(found, truth)


def test_wrong_epilogues():
    x, packed = torch.randn(3, 20), wf.nn.PackedLinear(20, 30).packed_weight
    with pytest.raises(wf.InputError, match=r"linear.*bias"):
        wf.ops.linear(x, packed, torch.randn(1))
    for shape in ((30,), (1, 30), (3, 1)):
        with pytest.raises(wf.InputError, match=r"linear.*residual"):
            wf.ops.linear(x, packed, residual=torch.randn(shape))
