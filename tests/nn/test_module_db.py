"""torch's own module database on our classes: its constructors, inputs and references, with gradients."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_leaves, tree_map

import warpformer as wf
from tests.check import is_float, threads

LAYERS = {  # with the number of inputs that torch 2.13 has for them, in eval and in train
    "Linear": (3, 3),
    "LayerNorm": (4, 4),
    "RMSNorm": (4, 4),
    "MultiheadAttention": (64, 64),
    "TransformerEncoderLayer": (35, 39),
    "TransformerEncoder": (35, 39),
    "TransformerDecoderLayer": (67, 67),
    "Transformer": (64, 64),
}
CASES = [(name, training) for name in LAYERS for training in (False, True)]


@pytest.fixture(autouse=True)
def _one_thread():
    """For inputs so small others would only wait for each other."""
    with threads(1):
        yield


def inputs(name, training):
    info = next(each for each in module_db if each.module_cls is getattr(nn, name))
    with warnings.catch_warnings():  # torch's encoder says why it will be slow
        warnings.simplefilter("ignore")
        return info.module_inputs_func(info, "cpu", torch.float32, True, training)


def build(cls, sample, training):
    arguments = sample.constructor_input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(*arguments.args, **arguments.kwargs).train(training)


def run(module, sample, dtype=torch.float32):
    """The outputs, and the gradients of their sum of inputs and parameters."""

    def converted(value):
        return value.detach().to(dtype).requires_grad_() if is_float(value) else value

    args, kwargs = tree_map(converted, (sample.forward_input.args, sample.forward_input.kwargs))
    outputs = [t for t in tree_leaves(module(*args, **kwargs)) if is_float(t)]
    leaves = [t for t in tree_leaves((args, kwargs)) if is_float(t)] + list(module.parameters())
    weighted = sum((t * torch.linspace(1, 2, t.numel(), dtype=dtype).view(t.shape)).sum() for t in outputs)
    return outputs, torch.autograd.grad(weighted, leaves, allow_unused=True)


def check_same(ours, theirs, tolerance=1e-5):
    assert len(ours) == len(theirs)
    for own, expected in zip(ours, theirs, strict=True):
        assert (own is None) == (expected is None)
        if own is not None:
            assert own.shape == expected.shape
            assert (own - expected).norm() <= tolerance * (1 + expected.norm())


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(("name", "training"), CASES)
def test_every_input(name, training):
    samples = inputs(name, training)
    assert len(samples) >= LAYERS[name][training]
    for sample in samples:
        ours = build(getattr(wf.nn, name), sample, training)
        theirs = build(getattr(nn, name), sample, training)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for own, expected in zip(run(ours, sample), run(theirs.double(), sample, torch.float64), strict=True):
            check_same(own, expected)
        if sample.reference_fn is not None:
            args, kwargs = copy.deepcopy((sample.forward_input.args, sample.forward_input.kwargs))
            check_same(
                tree_leaves(ours(*args, **kwargs)), tree_leaves(sample.reference_fn(ours, *args, **kwargs))
            )
        with torch.no_grad():
            args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
            check_same(*(tree_leaves(module.eval()(*args, **kwargs)) for module in (ours, theirs.float())))


@pytest.mark.parametrize("name", LAYERS)
def test_starts_as_torch_does(name):
    for sample in inputs(name, False):
        states = []
        for library in (nn, wf.nn):
            torch.manual_seed(7)
            states.append(build(getattr(library, name), sample, False).state_dict())
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
