"""What only a GPU shows: graphs, streams, and tensors on different devices. Collected where there is one."""

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

from tests.check import relative_error, same_bits
from tests.samples import SAMPLES, WITH_GRADIENT
from warpformer import InputError, nn, ops, quantization

pytestmark = pytest.mark.parametrize("device", ["cuda"], indirect=True)
every_op = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)


def gradients(call, leaves):
    out = call()
    return torch.autograd.grad(out, leaves, torch.ones_like(out))


@every_op
def test_graph_capture(device, sample):
    call = sample(torch.float32)
    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(float("nan"))
    graph.replay()
    assert same_bits(out, expected)


@pytest.mark.parametrize("sample", WITH_GRADIENT, ids=lambda s: s.__name__)
def test_graph_capture_of_gradients(device, sample):
    call, leaves = sample(torch.float32).leaves()
    expected = gradients(call, leaves)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(call, leaves)
    for t in found:
        t.fill_(float("nan"))
    graph.replay()
    assert all(map(same_bits, found, expected))


@every_op
def test_runs_on_the_current_stream(device, sample):
    """Its input is written late on another stream: only a kernel on that stream sees it."""
    call = sample(torch.float32)
    expected = call()
    hidden = []
    late = call.map(lambda t: hidden.append((t, torch.full_like(t, torch.nan))) or hidden[-1][1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for source, target in hidden:
            target.copy_(source)
        out = late()
    stream.synchronize()
    assert same_bits(out, expected)


@every_op
def test_an_operand_on_the_cpu_is_refused(device, sample):
    call = sample(torch.float32)
    first, *others = call.args
    mixed = replace(call, args=(tree_map(torch.Tensor.cpu, first), *others))
    with pytest.raises(InputError, match="cpu"):
        mixed()


@pytest.mark.parametrize("format", ["int8", "int8_dynamic", "int4", "int4_dynamic", "nf4"])
def test_layers_pack_anew_when_they_move(device, format):
    weight = quantization.quantize(torch.randn(40, 70, device="cpu"), format)
    layer = nn.Int8Linear if format.startswith("int8") else nn.Int4Linear
    layer = layer.from_quantized(weight)
    x, before = torch.randn(5, 70, device="cpu"), layer.state_dict()
    expected = layer(x)
    layer.to(device)
    torch.testing.assert_close(layer(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)
    for there in (layer.state_dict(), layer.to("cpu").state_dict()):
        assert all(torch.equal(there[name].cpu(), t) for name, t in before.items())
    assert same_bits(layer(x), expected)


@pytest.mark.parametrize("format", ["int8", "int8_dynamic", "int4", "int4_dynamic", "nf4"])
def test_layers_of_experts_pack_anew_when_they_move(device, format):
    weight = quantization.quantize(torch.randn(3, 40, 70, device="cpu"), format)
    layer = nn.QuantizedGroupedLinear.from_quantized(weight, gated=True)
    x, offsets = torch.randn(9, 70, device="cpu"), torch.tensor([2, 2, 9], device="cpu")
    expected = layer(x, offsets, "silu")
    layer.to(device)
    out = layer(x.to(device), offsets.to(device), "silu").cpu()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert same_bits(layer.to("cpu")(x, offsets, "silu"), expected)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.bfloat16, 64), (torch.bfloat16, 33), (torch.float32, 64)]
)
def test_dense_weights_of_experts(device, dtype, width):
    """By torch's grouped_mm or, of another dtype or width, expert by expert; against the CPU."""
    x, weight = torch.randn(50, width, dtype=dtype), torch.randn(4, 48, width, dtype=dtype) / 8
    inputs, offsets = (x, weight, torch.randn(4, 48, dtype=dtype)), torch.tensor([7, 7, 30, 50])
    grad = torch.randn(50, 24, dtype=dtype)

    def outputs(device):
        x, weight, bias = (t.detach().to(device).requires_grad_() for t in inputs)
        out = ops.grouped_linear(x, weight, offsets.to(device), bias, activation="silu", gated=True)
        return out, *torch.autograd.grad(out, (x, weight, bias), grad.to(device))

    for here, there in zip(outputs(device), outputs("cpu"), strict=True):
        assert relative_error(here.detach().cpu(), there.detach().double()) < 4 * torch.finfo(dtype).eps
