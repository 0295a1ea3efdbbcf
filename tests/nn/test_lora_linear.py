"""LoRALinear is what torch computes of the same numbers, forward and backward, on every kind of base."""

import pytest
import torch
from torch.nn import functional as F

import warpformer as wf
from warpformer.nn import FusedLinear, Linear, LoRALinear

K, RANK, ALPHA = 64, 3, 5.0
LAYERS = {
    "plain": lambda: Linear(K, 40),
    "no bias": lambda: Linear(K, 32, bias=False),
    "parts": lambda: FusedLinear(K, {"q": 32, "k": 16, "v": 16}),
    "gated": lambda: FusedLinear(K, {"gate": 48, "up": 48}, gated=True),
    "gated, no whole panels": lambda: FusedLinear(K, {"gate": 37, "up": 37}, gated=True),
}
BASES = ["float", "packed", "int8", "int4", "nf4", "int8_dynamic"]


def make(layer, base, **options):
    torch.manual_seed(0)
    inner = torch.nn.ModuleDict({"it": LAYERS[layer]()})
    if base == "packed":
        inner["it"] = inner["it"].to_packed()
    elif base != "float":
        wf.quantize_(inner, base, **({} if base.startswith("int8") else {"group_size": 32}))
    adapter = LoRALinear(inner["it"], RANK, ALPHA, **options)
    for part in adapter.B:
        torch.nn.init.normal_(part)
    return adapter


def reference(adapter, x, activation, residual):
    """By torch, of the dequantized weight."""
    weight, bias = adapter.base.weight.detach(), adapter.base.bias
    parts = dict(zip(adapter.adapted, zip(adapter.A.split(RANK), adapter.B, strict=True), strict=True))
    added = [
        ALPHA / RANK * (x @ parts[name][0].T) @ parts[name][1].T
        if name in parts
        else x.new_zeros(len(x), rows)
        for name, rows in adapter.rows.items()
    ]
    z = F.linear(x, weight, bias)
    if getattr(adapter.base, "format", None) == "int8_dynamic":  # of rounded activations
        z = z + (adapter._before_gate(x, None) - z).detach()
    z = z + torch.cat(added, -1)
    function = {"none": lambda t: t, "silu": F.silu, "relu": F.relu}[activation]
    if adapter.gated:
        gate, up = z.chunk(2, -1)
        out = function(gate) * up
    else:
        out = function(z)
    return out if residual is None else out + residual


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_values_and_gradients(layer, base, activation, has_residual):
    adapter = make(layer, base)
    width = adapter.out_features // (2 if adapter.gated else 1)
    x, residual = torch.randn(7, K, requires_grad=True), torch.randn(7, width, requires_grad=True)
    residual, grad = residual if has_residual else None, torch.randn(7, width)
    inputs = [x, adapter.A, *adapter.B, *([residual] if has_residual else [])]
    found = adapter(x, activation=activation, residual=residual)
    expected = reference(adapter, x, activation, residual)
    close(found, expected, 1e-4)
    for mine, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        close(mine, theirs, 1e-4)


def close(found, expected, tolerance):
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("base", ["float", "int4"])
def test_chosen_parts(base):
    adapter = make("parts", base, parts=["q", "v"])
    assert adapter.adapted == ["q", "v"]
    assert [tuple(part.shape) for part in adapter.B] == [(32, RANK), (16, RANK)]
    x = torch.randn(5, K)
    close(adapter(x), reference(adapter, x, "none", None), 1e-4)
    close(adapter(x), F.linear(x, adapter.weight, adapter.bias), 1e-4)
    assert torch.equal(adapter(x)[:, 32:48], adapter.base(x)[:, 32:48])


def test_it_begins_as_its_base():
    layer = Linear(K, 40)
    adapter, x = LoRALinear(layer), torch.randn(5, K)
    assert torch.equal(adapter(x), layer(x))
    assert {name for name, p in adapter.named_parameters() if p.requires_grad} == {"A", "B.0"}


def test_dropout_is_of_the_input_of_A():
    adapter = make("plain", "float", dropout=0.5)
    x = torch.randn(50, K)
    assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


def test_bfloat16_activations_and_float32_adapters():
    adapter = make("gated", "int4")
    x = torch.randn(7, K)
    found = adapter(x.bfloat16(), activation="silu")
    assert found.dtype == torch.bfloat16
    close(found.float(), reference(adapter, x, "silu", None), 3e-2)
    found.sum().backward()
    assert adapter.A.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert adapter(x, activation="silu").dtype == torch.bfloat16


def test_refused():
    with pytest.raises(wf.InputError, match="rank = 0"):
        LoRALinear(Linear(4, 4), 0)
    with pytest.raises(wf.InputError, match="base is a LayerNorm"):
        LoRALinear(wf.nn.LayerNorm(4))
    with pytest.raises(wf.InputError, match="base is a GroupedLinear"):
        LoRALinear(wf.nn.GroupedLinear(2, 4, 4))
    with pytest.raises(wf.InputError, match="parts = "):
        LoRALinear(LAYERS["parts"](), parts=["q", "w"])
