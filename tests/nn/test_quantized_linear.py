import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import warpformer as wf
from tests.check import relative_error, same_bits
from warpformer.quantization import dequantize, quantize

FORMATS = [
    ("int8", {}),
    ("int8", {"group_size": 32}),
    ("int8_dynamic", {}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 64, "zero_points": True}),
    ("int4_dynamic", {"group_size": -1}),
    ("nf4", {"group_size": 32}),
]
PARTS = {"query": 10, "key": 8, "value": 6}


def empty(format, options, n=24, k=75, **more):
    cls = wf.nn.Int8Linear if format.startswith("int8") else wf.nn.Int4Linear
    return cls(k, n, format=format, **options, **more)


def filled(format, options, n=24, k=75, parts=None):
    """A layer, its quantized weight and its bias."""
    layer = empty(format, options, n, k, parts=parts)
    quantized, bias = quantize(torch.randn(n, k), format, **options), torch.randn(n)
    return type(layer).from_quantized(quantized, nn.Parameter(bias), parts=parts), quantized, bias


def same_weight(a, b):
    assert a._replace(values=0, scales=0, zeros=0) == b._replace(values=0, scales=0, zeros=0)
    assert (a.zeros is None) == (b.zeros is None)
    pairs = [(getattr(a, name), getattr(b, name)) for name in ("values", "scales", "zeros")]
    return all(same_bits(x, y) for x, y in pairs if x is not None)


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_forward(device, format, options):
    layer, quantized, bias = filled(format, options)
    x, residual = torch.randn(2, 9, 75), torch.randn(2, 9, 24)
    expected = torch.relu(F.linear(x, dequantize(quantized), bias)) + residual
    out = layer(x, activation="relu", residual=residual).detach()
    assert relative_error(out, expected.double()) <= (0.02 if format.endswith("dynamic") else 1e-5)
    assert same_bits(layer.weight, dequantize(quantized))


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_state_dict_is_the_documented_layout(format, options):
    layer, quantized, bias = filled(format, options, parts=PARTS)
    state = layer.state_dict()
    kinds = ["qweight", "scales", *(["zeros"] if options.get("zero_points") else []), "bias"]
    assert [*state] == [f"{part}.{kind}" for kind in kinds for part in PARTS]
    whole = [torch.cat([state[f"{part}.{kind}"] for part in PARTS]) for kind in kinds]
    tensors = [quantized.values, quantized.scales, quantized.zeros, bias]
    assert all(same_bits(a, b) for a, b in zip(whole, [t for t in tensors if t is not None], strict=True))
    for device in ("cpu", "meta"):
        other = empty(format, options, parts=PARTS, device=device)
        other.load_state_dict(state, assign=device == "meta")
        assert same_weight(other.quantized_weight, quantized)
        assert same_bits(other.bias.detach(), bias)
        assert (other.format, other.zero_points) == (format, options.get("zero_points", False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_the_scales_stays(dtype):
    layer, quantized, _ = filled("int8", {})
    state = layer.state_dict()
    state["scales"] = state["scales"].to(dtype)
    layer.load_state_dict(state)
    layer.half()
    assert same_bits(layer.state_dict()["scales"], quantized.scales.to(dtype))
    assert layer.bias.dtype == torch.float16


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_copies(format, options):
    layer, quantized, _ = filled(format, options)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert same_weight(other.quantized_weight, quantized)
        assert other.packed.data_ptr() != layer.packed.data_ptr()


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_the_weight_is_held_once(format, options):
    layer, *_ = filled(format, options, n=256, k=1024)
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    bits = 8 if format.startswith("int8") else 4
    assert held <= 256 * 1024 * bits / 8 * 1.3
    assert [name for name, _ in layer.named_buffers()] == ["packed"]


@pytest.mark.parametrize(("format", "options"), FORMATS)
def test_gradient_of_the_input(format, options):
    layer, quantized, _ = filled(format, options)
    x = torch.randn(5, 75, requires_grad=True)
    grad = torch.randn(5, 24)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dequantize(quantized))
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


def test_compiles():
    layer, *_ = filled("int4", {"group_size": 32})
    x = torch.randn(5, 75)
    assert same_bits(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_empty_layer():
    layer = wf.nn.Int4Linear(64, 3, bias=False)
    assert not layer(torch.randn(2, 64)).any()
    assert layer.group_size == 128
    assert repr(layer) == "Int4Linear(in_features=64, out_features=3, bias=False, format='int4')"
    assert wf.nn.Int4Linear(64, 3, group_size=-1).group_size == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wf.nn.Int8Linear(4, 4, format="int4"), "Int8Linear: format = 'int4' is none of"),
        (
            lambda: wf.nn.Int4Linear(4, 4, format="int8"),
            "Int4Linear: format = 'int8' is none of|group_size = 128",
        ),
        (lambda: wf.nn.Int4Linear(4, 4, format="int3"), "format = 'int3' is none of"),
        (lambda: wf.nn.Int4Linear(4, 4, group_size=16), "group_size = 16 of int4"),
        (
            lambda: wf.nn.Int8Linear(64, 4, format="int8_dynamic", group_size=32),
            "group_size = 32 of int8_dynamic is none of in_features = 64",
        ),
        (lambda: wf.nn.Int4Linear(4, 4, format="nf4", zero_points=True), "zero_points: nf4 is symmetric"),
        (
            lambda: wf.nn.Int8Linear.from_quantized(quantize(torch.zeros(4, 32), "nf4")),
            "Int8Linear: format = 'nf4'",
        ),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(wf.InputError, match=message):
        make()


def test_errors_of_a_state_dict():
    layer, quantized, _ = filled("int4", {"group_size": 32, "zero_points": True})
    state = layer.state_dict()
    for changes, message in (
        ({"qweight": state["qweight"][:, 1:]}, "qweight has shape [24, 37], not [24, 38]"),
        ({"qweight": state["qweight"].to(torch.int8)}, "qweight has dtype torch.int8, not torch.uint8"),
        ({"scales": state["scales"].double()}, "scales has dtype torch.float64, not torch.float32"),
        ({"scales": state["scales"] * torch.inf}, "scales = bfloat16[24, 3] has NaN or Inf"),
        ({"zeros": state["zeros"] + 100}, "zeros = uint8[24, 3] has values above 15"),
    ):
        with pytest.raises(RuntimeError) as info:
            layer.load_state_dict(state | changes)
        assert message in str(info.value)
        assert same_weight(layer.quantized_weight, quantized)
    del state["zeros"]
    with pytest.raises(RuntimeError, match=r"Missing key.*zeros"):
        layer.load_state_dict(state)
