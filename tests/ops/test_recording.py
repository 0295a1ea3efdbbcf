"""Recording: what a function did with its tensors, done again without Python between the kernels."""

import threading

import pytest
import torch

import warpformer as wf
from tests.check import same_bits
from warpformer import _C, ops
from warpformer.ops._recording import Recording, Repeated

CPU = torch.device("cpu")
WEIGHT, TABLE = torch.randn(7, 5), torch.randn(11, 5)


def mixed(x):
    """Kernels, and ops of torch before, between and behind them; of the last one a view."""
    x = (x + 1).t().contiguous().t()
    x = ops.linear(ops.rms_norm(x, (5,)), WEIGHT)
    x[:, :2] *= 3
    values, index = x.topk(4)
    return ops.softmax(values.gather(1, index % 4) - index, -1)[:, 1:]


def kernels(x):
    return ops.softmax(ops.rms_norm(x, (5,)), -1)


@pytest.mark.parametrize("function", [mixed, kernels])
def test_other_values(function):
    x = torch.randn(3, 5)
    recording = Recording(lambda: function(x), CPU)
    assert recording.is_whole
    assert same_bits(recording.result, function(x))
    for _ in range(3):
        x.normal_()
        found = recording()
        assert found is recording.result
        assert same_bits(found, function(x))


def test_kernels_follow_each_other():
    x = torch.randn(3, 5)
    [part] = Recording(lambda: kernels(x), CPU)._parts
    assert part.__name__ == "run"
    calls = _C.Calls()
    calls.record()
    kernels(x)
    calls.stop()
    kernels(x)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0],
        lambda x: x * float(x.sum()),
        lambda x: x if bool((x > 0).all()) else -x,
        lambda x: x.repeat_interleave(torch.tensor([1, 0, 2]), 0),
        lambda x: ops.linear(x, WEIGHT.clone().requires_grad_()),
    ],
    ids=["mask", "item", "bool", "repeat_interleave", "gradient"],
)
def test_what_cannot_be_done_again(function):
    x = torch.randn(3, 5)
    recording = Recording(lambda: function(x), CPU)
    assert not recording.is_whole
    assert torch.equal(recording.result, function(x))


def test_errors_come_again():
    tokens = torch.tensor([3, 10])
    recording = Recording(lambda: ops.embedding(tokens, TABLE), CPU)
    tokens[1] = 11
    with pytest.raises(wf.InputError, match="11"):
        recording()
    tokens[1] = 0
    assert same_bits(recording(), TABLE[tokens])


def test_an_error_ends_a_recording():
    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Recording(fails, CPU)
    calls = _C.Calls()
    calls.record()  # nothing else is recording
    with pytest.raises(wf.InputError, match="records calls already"):
        _C.Calls().record()
    other = threading.Thread(target=kernels, args=(torch.randn(2, 5),))
    other.start()
    other.join()
    calls.stop()
    assert len(calls) == 0


def test_repeated():
    counts = []

    def best(scores):
        counts.append(len(scores))
        return ops.sample(scores)

    repeated, scores = Repeated(best), torch.randn(4, 50)
    found = []
    for _ in range(5):
        found.append((repeated(scores), scores.argmax(1)))
        scores.normal_()
    for tokens, expected in found:
        assert torch.equal(tokens, expected)
    assert counts == [4, 4]
    views = torch.randn(2, 3, 50)
    for column in (1, 1, 1, 2, 1, 2, 0, 1):  # eager, recorded, again; eager, again, recorded; eager twice
        assert torch.equal(repeated(views[:, column]), views[:, column].argmax(1))
        views.normal_()
    assert counts == [4, 4] + [2] * 6
