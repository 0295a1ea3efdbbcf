import copy

import pytest
import torch
from torch import nn

import warpformer as wf
from tests.check import check, check_gradients, relative_error, same_bits
from warpformer.ops import _kept


def packs(module):
    return [_kept._packs[p] for p in module.parameters() if p in _kept._packs]


def test_starts_as_torch_does():
    torch.manual_seed(5)
    theirs = nn.Linear(7, 5)
    torch.manual_seed(5)
    ours = wf.nn.Linear(7, 5)
    assert repr(ours) == repr(theirs)
    assert all(same_bits(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_trains(dtype):
    ours, theirs = wf.nn.Linear(70, 90, dtype=dtype), nn.Linear(70, 90)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 50, 70, dtype=dtype)

    def by_torch(x, weight, bias):
        return nn.functional.linear(x, weight, bias)

    def by_us(x, weight, bias):
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, *(p.detach() for p in ours.parameters()))
    check(by_us, by_torch, *inputs)
    check_gradients(by_us, by_torch, *inputs)


@torch.no_grad()
def test_packs_once(dtype):
    layer, x = wf.nn.Linear(70, 90, dtype=dtype).eval(), torch.randn(5, 70, dtype=dtype)
    first = layer(x)
    (before,) = packs(layer)
    before = dict(before)
    assert same_bits(layer(x), first)
    assert packs(layer)[0] == before


CHANGES = {
    "an operation in place": lambda layer: layer.weight.mul_(2),
    "a state_dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "a state_dict assigned": lambda layer: layer.load_state_dict(
        {k: 2 * v for k, v in layer.state_dict().items()}, assign=True
    ),
    "other memory": lambda layer: setattr(layer.weight, "data", 2 * layer.weight.data),
    "a write through data": lambda layer: (layer.weight.data.mul_(2), wf.repack_(layer)),
    "another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(2 * layer.weight)),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_sees_changes(change):
    layer, x = wf.nn.Linear(16, 16, bias=False).eval(), torch.randn(4, 16)
    before = layer(x)
    CHANGES[change](layer)
    assert same_bits(layer(x), 2 * before)


def test_sees_the_step_of_an_optimizer():
    layer, x = wf.nn.Linear(16, 16), torch.randn(4, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        layer(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("change", [nn.Module.train, nn.Module.double, nn.Module.bfloat16])
def test_frees_packs_that_will_be_stale(change):
    model = nn.Sequential(wf.nn.Linear(16, 16)).eval()
    with torch.no_grad():
        model(torch.randn(4, 16))
    assert packs(model)
    change(model)
    assert not packs(model)


def test_keeps_no_packs_while_it_trains():
    layer = wf.nn.Linear(16, 16)
    layer(torch.randn(4, 16)).sum().backward()
    assert not packs(layer)


def test_frozen_weights_are_packed_once():
    layer, x = wf.nn.Linear(40, 50).requires_grad_(False), torch.randn(6, 40, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(6, -1))
    assert len(packs(layer)) == 1


@torch.no_grad()
def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        layer = wf.nn.Linear(16, 16)
        x = torch.randn(4, 16)
        before = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        assert same_bits(layer(x), 2 * before)


def test_copies_share_nothing():
    layer = wf.nn.Linear(16, 16).eval()
    with torch.no_grad():
        layer(torch.randn(4, 16))
    other = copy.deepcopy(layer)
    assert packs(layer)
    assert not packs(other)
    assert same_bits(other.weight, layer.weight)


def test_autocast():
    ours, theirs = wf.nn.Linear(70, 90), nn.Linear(70, 90)
    theirs.load_state_dict(ours.state_dict())
    x, exact = torch.randn(50, 70), copy.deepcopy(theirs).double()
    truth = exact(x.double())
    truth.square().sum().backward()
    errors = []
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16
        assert layer.weight.grad.dtype == torch.float32
        errors.append([relative_error(out, truth), relative_error(layer.weight.grad, exact.weight.grad)])
    assert all(own <= 1.1 * by_torch for own, by_torch in zip(*errors, strict=True))


@torch.no_grad()
def test_autocast_without_gradients():
    layer, x = wf.nn.Linear(70, 90), torch.randn(5, 70)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert same_bits(layer(x), out)
    (kept,) = packs(layer)
    assert len(kept) == 1
    assert same_bits(out, wf.ops.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias))


def test_compiles():
    layer, x = wf.nn.Linear(33, 21), torch.randn(5, 33, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x, activation="relu"), layer(x, activation="relu"))
    compiled(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.detach().sum(0).expand(21, -1))
    with torch.no_grad():
        compiled(x)
    assert len(packs(layer)) == 1


def test_activation_and_residual():
    layer, x, residual = wf.nn.Linear(16, 16), torch.randn(3, 16), torch.randn(3, 16)
    expected = torch.relu(nn.functional.linear(x, layer.weight, layer.bias)) + residual
    torch.testing.assert_close(layer(x, activation="relu", residual=residual), expected)
