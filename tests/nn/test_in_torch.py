"""Layers under what torch does to them: autocast, compilation, checkpointing, copies, DDP, torch.func."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import warpformer as wf
from tests.check import relative_error, same_bits

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch itself

B, T, C, H, FF = 3, 6, 32, 4, 48
MASK = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDING = torch.arange(T) >= torch.tensor([6, 2, 4])[:, None]


def attention(layer, x):
    return layer(x, x, x, key_padding_mask=PADDING, attn_mask=MASK, need_weights=False)[0]


def weights(layer, x):
    return layer(x, x, x, key_padding_mask=PADDING)[1]


def encoder(layer, x):
    return layer(x, src_mask=MASK, src_key_padding_mask=PADDING, is_causal=True)


def stack(layer, x):
    return layer(x, mask=MASK, src_key_padding_mask=PADDING)


def decoder(layer, x):
    return layer(x, x.flip(1), tgt_mask=MASK, memory_key_padding_mask=PADDING)


def encoder_of(nn, **options):
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(C, H, FF, **options), 2, enable_nested_tensor=False
    )


OPTIONS = {"dropout": 0.1, "batch_first": True}
LAYERS = {  # name -> (what makes it of the classes of torch.nn or of ours, how it is called)
    "Linear": (lambda nn: nn.Linear(C, C), lambda layer, x: layer(x)),
    "LayerNorm": (lambda nn: nn.LayerNorm(C), lambda layer, x: layer(x)),
    "RMSNorm": (lambda nn: nn.RMSNorm(C), lambda layer, x: layer(x)),
    "Dropout": (lambda nn: nn.Dropout(0.3), lambda layer, x: layer(x)),
    "MultiheadAttention": (lambda nn: nn.MultiheadAttention(C, H, **OPTIONS), attention),
    "its weights": (lambda nn: nn.MultiheadAttention(C, H, **OPTIONS), weights),
    "TransformerEncoderLayer": (lambda nn: nn.TransformerEncoderLayer(C, H, FF, **OPTIONS), encoder),
    "norm_first": (lambda nn: nn.TransformerEncoderLayer(C, H, FF, norm_first=True, **OPTIONS), encoder),
    "TransformerEncoder": (lambda nn: encoder_of(nn, **OPTIONS), stack),
    "TransformerDecoderLayer": (lambda nn: nn.TransformerDecoderLayer(C, H, FF, **OPTIONS), decoder),
    "Transformer": (lambda nn: nn.Transformer(C, H, 1, 1, FF, **OPTIONS), decoder),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name, nn=wf.nn):
    build, call = LAYERS[name]
    return build(nn), call, torch.randn(B, T, C)


def gradients(layer, call, x):
    """The output, and the gradients of x and of all parameters, with the same dropout every time."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    out = call(layer, x)
    found = torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()], allow_unused=True)
    return [out, *(g for g in found if g is not None)]


@every_layer
def test_autocast(name):
    ours, call, x = make(name)
    theirs = make(name, nn)[0]
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).double().eval()
    truth = gradients(exact, call, x.double())
    found = []
    for layer in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(layer.eval(), call, x))
    for own, by_torch, expected in zip(*found, truth, strict=True):
        assert own.dtype == by_torch.dtype
        assert relative_error(own, expected) <= max(1.5 * relative_error(by_torch, expected), 0.01)


@every_layer
def test_trains_under_autocast(name):
    layer, call, x = make(name)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.1)
    optimizer = torch.optim.SGD([*layer.parameters(), nn.Parameter(torch.zeros(()))], lr=1e-3)
    before = [p.detach().clone() for p in layer.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        out = call(layer.train(), x.requires_grad_())
    out.float().square().mean().backward()
    optimizer.step()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in layer.parameters())
    assert x.grad.isfinite().all()
    moved = [not same_bits(a, b) for a, b in zip(before, layer.parameters(), strict=True)]
    assert not moved or any(moved)


@every_layer
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(name, training):
    layer, call, x = make(name)
    layer.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(layer, x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.manual_seed(3)
        out = compiled(x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, call(layer, x))
    expected = gradients(layer, call, x)
    torch.testing.assert_close(gradients(layer, lambda layer, x: compiled(x), x), expected)


def test_compiles_with_inductor():
    layer, call, x = make("TransformerEncoderLayer")
    torch._dynamo.reset()
    compiled = torch.compile(layer.eval(), fullgraph=True)
    torch.testing.assert_close(gradients(compiled, call, x), gradients(layer, call, x))


@every_layer
def test_checkpointing(name):
    layer, call, x = make(name)
    expected = gradients(layer, call, x)
    found = gradients(layer, lambda layer, x: checkpoint(call, layer, x, use_reentrant=False), x)
    assert all(map(same_bits, found, expected))


@every_layer
def test_copies(name):
    layer, call, x = make(name)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    expected = gradients(layer, call, x)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert all(map(same_bits, gradients(other, call, x), expected))


def test_data_parallel(tmp_path):
    layer, call, x = make("TransformerEncoderLayer")
    expected = gradients(layer, call, x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(copy.deepcopy(layer))
        torch.manual_seed(3)
        call(parallel, x.clone().requires_grad_()).square().sum().backward()
        found = [p.grad for p in parallel.parameters()]
        del parallel  # the last owner of a group waits for its threads, and DDP's Reducer with the GIL held
    finally:
        torch.distributed.destroy_process_group()
    assert all(map(same_bits, found, expected[2:]))


@every_layer
def test_functional_call(name):
    layer, call, x = make(name)
    state = {key: 2 * value.detach() for key, value in layer.state_dict().items()}
    layer.eval()
    other = copy.deepcopy(layer)
    other.load_state_dict(state)
    arguments = []
    call(lambda *args, **kwargs: (arguments.append((args, kwargs)), (x, x))[1], x)
    (args, kwargs) = arguments[0]
    out = torch.func.functional_call(layer, state, args, kwargs)
    expected = other(*args, **kwargs)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["Linear", "LayerNorm", "MultiheadAttention", "TransformerEncoderLayer"])
def test_func_transforms_say_what_they_lack(name):
    layer, call, x = make(name)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return call(lambda *a, **k: torch.func.functional_call(layer, parameters, a, k), x).sum()

    with pytest.raises(NotImplementedError, match=r"warpformer\.ops\..* torch\.func"):
        torch.func.grad(loss)(parameters)
    with pytest.raises(NotImplementedError, match=r"warpformer\.ops\.\w+ has no forward-mode gradient"):
        torch.func.jvp(lambda x: call(layer, x), (x,), (x,))
