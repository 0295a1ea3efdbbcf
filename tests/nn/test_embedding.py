import math

import pytest
import torch
from torch import nn

import warpformer as wf
from tests.check import same_bits

V, C, B, T = 50, 12, 3, 9


def ids():
    return torch.randint(0, V, (B, T))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_as_torch(options):
    theirs, ours = nn.Embedding(V, C, **options), wf.nn.Embedding(V, C, **options)
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    tokens, weights = ids(), torch.randn(B, T, C)
    outs = [layer(tokens) for layer in (ours, theirs)]
    torch.testing.assert_close(*outs)
    gradients = [
        torch.autograd.grad((out * weights).sum(), layer.weight)[0]
        for out, layer in zip(outs, (ours, theirs), strict=True)
    ]
    torch.testing.assert_close(*gradients)


def test_starts_as_torch_does():
    states = []
    for library in (nn, wf.nn):
        torch.manual_seed(4)
        states.append(library.Embedding(V, C, padding_idx=1).weight)
    assert same_bits(*(state.detach() for state in states))


def test_sinusoidal_positions_are_those_of_the_paper():
    table = wf.nn.sinusoidal_positions(400, C)
    for position in (0, 1, 17, 399):
        for i in range(C // 2):
            angle = position / 10000 ** (2 * i / C)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-7)
    assert wf.nn.sinusoidal_positions(5, 7).shape == (5, 7)


@pytest.mark.parametrize("scale", [1.0, C**0.5])
@pytest.mark.parametrize("positions", ["sinusoidal", "learned"])
def test_positions(dtype, positions, scale):
    layer = wf.nn.Embedding(V, C, dtype=dtype, positions=positions, max_length=20, scale=scale)
    learned = ["positions"] if positions == "learned" else []
    assert sorted(layer.state_dict()) == sorted(["weight", *learned])
    tokens, places = ids(), torch.randint(0, 20, (B, 1)) * 0 + torch.arange(5, 5 + T)
    exact = layer.weight.double() * scale
    for arguments, used in (((tokens,), torch.arange(T)), ((tokens, places), places)):
        expected = exact[tokens] + layer.positions.double()[used]
        out = layer(*arguments)
        assert out.dtype == dtype
        error = (out.double() - expected).norm() / expected.norm()
        assert error <= 2 * torch.finfo(dtype).eps
    out.sum().backward()
    assert layer.weight.grad is not None
    assert not learned or (layer.positions.grad[5 : 5 + T] == B).all()


def test_wrong_arguments():
    with pytest.raises(wf.InputError, match="positions = 'rotary' is none of"):
        wf.nn.Embedding(V, C, positions="rotary")
    with pytest.raises(wf.InputError, match=r"position_ids \[9\] without positions"):
        wf.nn.Embedding(V, C)(ids(), torch.arange(T))
    with pytest.raises(wf.InputError):
        wf.nn.Embedding(V, C, positions="learned", max_length=T - 1)(ids())
