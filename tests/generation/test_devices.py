"""Every architecture on a GPU that is not there: fake tensors of torch have a device and no values.
What mixes devices, or needs a value on the host, fails."""

import sys
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tests.models.checkpoints import DECODERS, SEQ2SEQ
from warpformer.nn._packed import PackedModule
from warpformer.ops.linear import DTYPES

from .models import prompts

GPU = torch.device("cuda", 0)


class WithoutDriver(TorchFunctionMode):
    """What torch built without CUDA refuses to do, even with fake tensors: to move them and to index them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        there = function is Tensor.to or any(isinstance(t, Tensor) and t.device == GPU for t in args)
        function = self.KNOWN.get(function, function) if there else function
        return function(*args, **kwargs or {})


def fake(shape, dtype):
    return torch.empty(shape, dtype=dtype, device=GPU)


def moved(t, *where, device=None, dtype=None, **options):
    for argument in where:
        if isinstance(argument, torch.dtype):
            dtype = argument
        elif not isinstance(argument, bool):
            device = argument.device if isinstance(argument, Tensor) else argument
    device = t.device if device is None else torch.device(device)
    assert device.type == "cuda" or t.device.type == "cpu", "the host waits for the GPU"
    if device.type == "cuda":
        return fake(t.shape, dtype or t.dtype)
    with torch._C.DisableTorchFunction():
        return t.to(device, dtype or t.dtype)


def indexed(t, index):
    index = index if isinstance(index, tuple) else (index,)
    tensors = [i for i in index if isinstance(i, Tensor)]
    assert all(i.device == GPU and i.dtype != torch.bool for i in tensors if i.ndim), index
    with torch._C.DisableTorchFunction():
        meta = [i.to("meta") if isinstance(i, Tensor) else i for i in index]
        shape = torch.empty(t.shape, device="meta")[tuple(meta)].shape
    return fake(shape, t.dtype)


def set_at(t, index, value):
    assert not isinstance(value, Tensor) or value.shape.numel() == 1 or value.device == GPU
    indexed(t, index)


WithoutDriver.KNOWN = {
    Tensor.to: moved,
    Tensor.copy_: lambda t, source, non_blocking=False: t,
    Tensor.__getitem__: indexed,
    Tensor.__setitem__: set_at,
}


def put_there(model):
    """The parameters and buffers of a model become fake ones on the GPU, as `.to` would have them."""
    for module in model.modules():
        for name, t in module._parameters.items():
            if t is not None:
                module._parameters[name] = nn.Parameter(fake(t.shape, t.dtype), requires_grad=False)
        for name, t in module._buffers.items():
            if t is not None:
                module._buffers[name] = fake(t.shape, t.dtype)
        if isinstance(module, PackedModule):
            layout = module._layout
            assert layout.format in DTYPES
            shape = *module.packed.shape[:-2], layout.out_features, layout.in_features
            module.packed = fake(shape, DTYPES[layout.format])


@pytest.mark.parametrize("name", DECODERS | SEQ2SEQ)
def test_every_architecture(models, name):
    model = deepcopy(models(name)[0])
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), WithoutDriver():
        put_there(model)
        ids = fake((2, 7), torch.int64)
        if name in SEQ2SEQ:
            assert model(ids, decoder_input_ids=ids[:, :3]).device == GPU
            return  # the lengths of a memory are read once, which has no values here
        assert model(ids).device == GPU
        cache = model.make_cache()
        model(ids, cache=cache)
        for _ in range(3):
            logits = model(ids[:, :1], cache=cache, logits_to_keep=1)
            assert logits.device == GPU


@pytest.mark.parametrize("name", DECODERS | SEQ2SEQ)
def test_plain_weights(models, name, monkeypatch):
    """Which models have on a GPU, give the same logits: here on the CPU."""
    packed = models(name)[0]
    plain = deepcopy(packed)
    expected = decoded(packed, name)
    for op in ("linear", "grouped_linear"):
        monkeypatch.setattr(sys.modules[f"warpformer.ops.{op}"], "multiplies_by_torch", lambda t: True)
    for module in plain.modules():
        if isinstance(module, PackedModule):
            module.pack(module.weight)
            assert module.packed.is_floating_point()
    torch.testing.assert_close(decoded(plain, name), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def decoded(model, name):
    """Logits of prompts, and of a token behind them."""
    ids, mask = prompts(name)
    first, step = dict(input_ids=ids, attention_mask=mask), dict(input_ids=ids[:, :1])
    if name in SEQ2SEQ:
        first, step = first | dict(decoder_input_ids=ids[:, :4]), dict(decoder_input_ids=ids[:, :1])
    cache = model.make_cache()
    return model(**first, cache=cache), model(**step, cache=cache)
