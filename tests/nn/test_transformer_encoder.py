import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import warpformer as wf
from tests.check import same_bits

B, T, C, H, FF = 4, 11, 32, 4, 48


def pair(**options):
    """torch's layer and ours, with the same weights."""
    theirs = nn.TransformerEncoderLayer(C, H, FF, **copy.deepcopy(options))
    ours = wf.nn.TransformerEncoderLayer(C, H, FF, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def padding():
    return torch.arange(T) >= torch.tensor([T, 1, 5, 8])[:, None]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", F.silu, nn.GELU("tanh"), lambda x: x.sigmoid()])
def test_activations(activation, norm_first, training):
    ours, theirs = pair(dropout=0.0, activation=activation, norm_first=norm_first, batch_first=True)
    x = torch.randn(B, T, C)
    outs = [layer.train(training)(x) for layer in (ours, theirs)]
    torch.testing.assert_close(*outs)
    for layer, out in zip((ours, theirs), outs, strict=True):
        out.square().sum().backward()
        layer.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), outs[1])


@pytest.mark.parametrize(
    "watched", ["linear1", "linear2", "norm1", "norm2", "dropout", "self_attn", "activation"]
)
def test_hooks_see_what_those_of_torch_see(watched):
    layers = pair(dropout=0.0, activation=nn.ReLU(), batch_first=True)
    x, seen = torch.randn(B, T, C), []
    for layer in layers:
        layer.eval().get_submodule(watched).register_forward_hook(
            lambda module, args, out: seen.append((args[0], out[0] if isinstance(out, tuple) else out))
        )
    with torch.no_grad():
        outs = [layer(x) for layer in layers]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*seen)


def test_hooks_may_change_the_output():
    layers = pair(dropout=0.0, batch_first=True)
    for layer in layers:
        layer.eval().linear1.register_forward_hook(lambda module, args, out: out - 1)
    x = torch.randn(B, T, C)
    torch.testing.assert_close(*[layer(x) for layer in layers])


def test_replaced_layers_are_called():
    ours, theirs = pair(dropout=0.0, batch_first=True)
    for layer in (ours, theirs):
        layer.train().norm1 = nn.Identity()
        layer.linear1 = nn.Sequential(copy.deepcopy(theirs.linear1), nn.Tanh())
    x = torch.randn(B, T, C)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("mode", ["int8", "int4"])
@torch.no_grad()
def test_quantized(mode):
    ours, _ = pair(batch_first=True)
    x = torch.randn(B, T, C)
    expected = ours.eval()(x)
    before = copy.deepcopy(ours)
    report = wf.quantize_(ours, mode, 32)
    layers = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert sorted(row.name for row in report if not row.note) == sorted(layers)
    assert "self_attn.in_proj.qweight" in ours.state_dict()
    error = (ours(x) - expected).norm() / expected.norm()
    assert 0 < error < (0.02 if mode == "int8" else 0.2)
    wf.quantize_(before, mode, 32).clear()
    before.load_state_dict(ours.state_dict())
    assert same_bits(before(x), ours(x))


def test_dropout_is_drawn():
    ours, _ = pair(dropout=0.5, batch_first=True)
    x = torch.randn(B, T, C)
    assert not same_bits(ours(x), ours(x))
    ours.eval()
    assert same_bits(ours(x), ours(x))


ENCODERS = {
    "torch packs": {"batch_first": True},
    "tokens first": {"batch_first": False},
    "norm first": {"batch_first": True, "norm_first": True},
    "no bias": {"batch_first": True, "bias": False},
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested")
@pytest.mark.parametrize("option", ENCODERS)
@torch.no_grad()
def test_encoder_with_padding(option):
    options = ENCODERS[option] | {"activation": "gelu"}
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, H, FF, **options), 3, nn.LayerNorm(C)).eval()
    ours = wf.nn.TransformerEncoder(
        wf.nn.TransformerEncoderLayer(C, H, FF, **options), 3, nn.LayerNorm(C)
    ).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(B, T, C) if options["batch_first"] else torch.randn(T, B, C)
    out, expected = (encoder(x, src_key_padding_mask=padding()) for encoder in (ours, theirs))
    torch.testing.assert_close(out, expected)


@torch.no_grad()
def test_encoder_packs_for_a_causal_mask():
    encoder = wf.nn.TransformerEncoder(wf.nn.TransformerEncoderLayer(C, H, FF, batch_first=True), 2).eval()
    x, mask = torch.randn(B, T, C), nn.Transformer.generate_square_subsequent_mask(T)
    packed = encoder(x, mask=mask, src_key_padding_mask=padding())
    assert (packed[padding()] == 0).all()
    encoder.use_nested_tensor = False
    plain = encoder(x, mask=mask, src_key_padding_mask=padding())
    torch.testing.assert_close(packed[~padding()], plain[~padding()])
    assert (plain[padding()] != 0).any()


@torch.no_grad()
def test_hooks_keep_the_padding():
    encoder = wf.nn.TransformerEncoder(wf.nn.TransformerEncoderLayer(C, H, FF, batch_first=True), 2).eval()
    shapes = []
    encoder.layers[1].norm2.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    encoder(torch.randn(B, T, C), src_key_padding_mask=padding())
    assert shapes == [(B, T, C)]


@torch.no_grad()
def test_a_sequence_of_padding_is_finite():
    encoder = wf.nn.TransformerEncoder(wf.nn.TransformerEncoderLayer(C, H, FF, batch_first=True), 2).eval()
    mask = padding()
    mask[1] = True
    x = torch.randn(B, T, C)
    assert encoder(x, src_key_padding_mask=mask).isfinite().all()
    assert encoder.layers[0](x, src_key_padding_mask=mask).isfinite().all()
    assert encoder.train()(x, src_key_padding_mask=mask).isfinite().all()


def test_wrong_shapes():
    encoder = wf.nn.TransformerEncoder(wf.nn.TransformerEncoderLayer(C, H, FF, batch_first=True), 2).eval()
    x = torch.randn(B, T, C)
    with pytest.raises(AssertionError, match=r"query = float32\[4, 11, 16\]"):
        encoder(x[..., :16])
    for grad in (True, False):
        with (
            pytest.raises(RuntimeError, match=r"bool\[4, 10\] is not \[4, 11\]"),
            torch.set_grad_enabled(grad),
        ):
            encoder(x, src_key_padding_mask=padding()[:, 1:])
    with pytest.raises(RuntimeError, match=r"attn_mask = float32\[11, 3\]"):
        encoder(x, mask=torch.zeros(T, 3))
    with pytest.raises(ValueError, match="is_causal = True, but"):
        encoder(x, mask=torch.zeros(T, T), is_causal=True)
    with pytest.raises(ValueError, match="is_causal = True, but"), torch.no_grad():
        encoder(x, mask=torch.zeros(T, T), src_key_padding_mask=padding(), is_causal=True)
