import pytest
import torch
from torch import nn

import warpformer as wf
from tests.check import relative_error, same_bits

B, T, S, E, H = 3, 7, 9, 24, 4


def pair(**options):
    """torch's layer and ours, with the same weights, in eval mode."""
    theirs = nn.MultiheadAttention(E, H, **options).eval()
    ours = wf.nn.MultiheadAttention(E, H, **options).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def operands(batch_first=True, kdim=E, vdim=E):
    tensors = torch.randn(B, T, E), torch.randn(B, S, kdim), torch.randn(B, S, vdim)
    return tensors if batch_first else tuple(t.transpose(0, 1).contiguous() for t in tensors)


def some(*shape):
    """A mask that leaves the first key to everybody."""
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


def additive(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv and zeros": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "kdim and vdim": {"kdim": 16, "vdim": 20},
}
MASKS = {
    "none": lambda: {},
    "bool": lambda: {"attn_mask": some(T, S)},
    "float": lambda: {"attn_mask": torch.randn(T, S)},
    "of each head": lambda: {"attn_mask": some(B * H, T, S)},
    "padding": lambda: {"key_padding_mask": some(B, S)},
    "padding, float": lambda: {"key_padding_mask": additive(some(B, S))},
    "both": lambda: {"attn_mask": some(T, S), "key_padding_mask": some(B, S)},
    "both, float": lambda: {"attn_mask": torch.randn(T, S), "key_padding_mask": additive(some(B, S))},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_as_torch(option, mask):
    options = OPTIONS[option]
    ours, theirs = pair(**options)
    widths = {key: options[key] for key in ("kdim", "vdim") if key in options}
    inputs = operands(options.get("batch_first", False), **widths)
    masks = MASKS[mask]()
    for need_weights, average in ((True, True), (True, False), (False, True)):
        arguments = masks | {"need_weights": need_weights, "average_attn_weights": average}
        for own, expected in zip(ours(*inputs, **arguments), theirs(*inputs, **arguments), strict=True):
            assert (own is None) == (expected is None)
            if own is not None:
                torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("option", ["batch_first", "bias_kv and zeros"])
def test_causal(option, need_weights):
    ours, theirs = pair(**OPTIONS[option])
    x = torch.randn(B, T, E)
    mask = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = theirs(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
    for arguments in (
        {"attn_mask": mask, "is_causal": True},
        {"attn_mask": additive(mask), "is_causal": True},
        {"attn_mask": mask},
        {"is_causal": True},
    ):
        torch.testing.assert_close(ours(x, x, x, need_weights=need_weights, **arguments)[0], expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_sequence_of_padding_is_finite(need_weights):
    ours, theirs = pair(batch_first=True)
    x = torch.randn(B, T, E, requires_grad=True)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1] = True
    out, _ = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert theirs(x, x, x, key_padding_mask=padding)[0][1].isnan().all()
    assert torch.equal(out[1], ours.out_proj.bias.expand_as(out[1]))
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_dropout_of_the_weights():
    ours, _ = pair(dropout=0.5, batch_first=True)
    x = torch.randn(2, 64, E)
    quiet = ours(x, x, x)[1]
    ours.train()
    out, weights = ours(x, x, x, average_attn_weights=False)
    share = (weights == 0).float().mean().item()
    assert 0.45 < share < 0.55
    torch.testing.assert_close(weights.mean(1).mean(), quiet.mean(), rtol=0.05, atol=0.0)
    assert not same_bits(out, ours(x, x, x)[0])
    assert not same_bits(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))


def test_dtypes(dtype):
    ours, theirs = pair(batch_first=True)
    exact = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64).eval()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(40, T, E)
    truth = exact(*[x.to(dtype).double()] * 3)[0]
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), x.to(dtype)
    error, by_torch = (
        relative_error(layer(x, x, x, need_weights=False)[0], truth) for layer in (ours, theirs)
    )
    assert error <= max(1.1 * by_torch, torch.finfo(dtype).eps)


def test_hooks_of_the_output_layer():
    layer, _ = pair(batch_first=True)
    seen = []
    layer.out_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(B, T, E)
    assert layer(x, x, x, need_weights=False)[0] is seen[0]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("option", ["plain", "batch_first", "bias_kv and zeros"])
@torch.no_grad()
def test_cache(option, padded, need_weights):
    layer, _ = pair(**OPTIONS[option])
    steps = (4, 1, 1, 70, 2)
    total = sum(steps)
    x = torch.randn(B, total, E)
    padding = some(B, total) if padded else None
    order = (lambda t: t) if layer.batch_first else (lambda t: t.transpose(0, 1))
    x = order(x).contiguous()
    whole, _ = layer(x, x, x, key_padding_mask=padding, is_causal=True)
    cache, outputs, end = layer.make_cache(), [], 0
    for count in steps:
        new = order(order(x)[:, end : end + count])
        end += count
        mask = None if padding is None else padding[:, :end]
        outputs.append(layer(new, new, new, key_padding_mask=mask, need_weights=need_weights, cache=cache)[0])
        assert cache.longest == end
    torch.testing.assert_close(torch.cat([order(t) for t in outputs], 1), order(whole))


@torch.no_grad()
def test_cache_of_a_memory():
    layer, _ = pair(batch_first=True)
    query, memory, _ = operands()
    cache = layer.make_cache(of_memory=True)
    expected = layer(query, memory, memory, need_weights=False)[0]
    for other in (memory, torch.full_like(memory, torch.nan)):
        torch.testing.assert_close(layer(query, other, other, need_weights=False, cache=cache)[0], expected)
    cache.reorder_(torch.tensor([2, 0]))
    expected = layer(query[:2], memory[[2, 0]], memory[[2, 0]], need_weights=False)[0]
    out = layer(query[:2], memory[:2], memory[:2], need_weights=False, cache=cache)[0]
    torch.testing.assert_close(out, expected)


def test_a_cache_is_for_inference():
    layer, _ = pair(batch_first=True)
    x = torch.randn(B, 1, E)
    with pytest.raises(wf.InputError, match="no_grad"):
        layer(x, x, x, cache=layer.make_cache())
    cache = layer.make_cache()
    with torch.no_grad():
        layer(x, x, x, cache=cache)
        with pytest.raises(wf.InputError, match="3 sequences, and the batch has 2"):
            layer(x[:2], x[:2], x[:2], cache=cache)


WRONG = {  # argument, what it is, and what the error says
    "another width": ("query", torch.zeros(B, T, 5), r"\(24, 24, 24\): query = float32\[3, 7, 5\]"),
    "another number of dimensions": ("key", torch.zeros(S, E), r"key = float32\[9, 24\]"),
    "four dimensions": ("query", torch.zeros(1, B, T, E), r"neither unbatched .* float32\[1, 3, 7, 24\]"),
    "other tokens": ("value", torch.zeros(B, S + 1, E), r"same tokens: .*value = float32\[3, 10, 24\]"),
    "another batch": ("query", torch.zeros(B + 1, T, E), r"batches \(dim 0\) differ: query = float32\[4, "),
    "a mask of other keys": (
        "attn_mask",
        torch.zeros(T, T),
        r"float32\[7, 7\] is not \[7, 9\] or \[12, 7, 9\]",
    ),
    "a mask of the batch": ("attn_mask", torch.zeros(B, T, S), r"attn_mask = float32\[3, 7, 9\] is not"),
    "integers": ("attn_mask", torch.zeros(T, S).int(), r"floating types of attn_mask .* int32\[7, 9\]"),
    "padding of queries": ("key_padding_mask", torch.zeros(B, T).bool(), r"bool\[3, 7\] is not \[3, 9\]"),
    "padding of integers": (
        "key_padding_mask",
        torch.zeros(B, S).long(),
        "floating types of key_padding_mask",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("error", [AssertionError, RuntimeError, ValueError, wf.InputError])
def test_wrong_arguments(case, error):
    layer, _ = pair(batch_first=True)
    name, tensor, message = WRONG[case]
    arguments = dict(zip(("query", "key", "value"), operands(), strict=True))
    with pytest.raises(error, match=message):
        layer(**arguments | {name: tensor})


def test_a_mask_that_is_not_causal():
    layer, _ = pair(batch_first=True)
    for mask in (torch.zeros(T, S).bool(), torch.zeros(T, S), torch.ones(T, S).bool().triu(2)):
        with pytest.raises(AssertionError, match=r"is_causal = True, but the mask .*\[7, 9\]"):
            layer(*operands(), attn_mask=mask, is_causal=True)


def test_a_mask_that_changes_is_read_again():
    layer, _ = pair(batch_first=True)
    x, mask = torch.randn(B, T, E), torch.ones(T, T, dtype=torch.bool).triu(1)
    layer(x, x, x, attn_mask=mask, is_causal=True)
    mask[0, 1] = False
    with pytest.raises(wf.InputError, match="is_causal"):
        layer(x, x, x, attn_mask=mask, is_causal=True)


@pytest.mark.parametrize("width", [48, 20])
@torch.no_grad()
def test_quantized_projections(width):
    layer = wf.nn.MultiheadAttention(width, 4, batch_first=True).eval()
    nn.init.normal_(layer.in_proj_bias)
    weight, bias = layer.in_proj_weight.detach(), layer.in_proj_bias.detach()
    query, memory = torch.randn(B, T, width), torch.randn(B, S, width)
    wf.quantize_(layer, "int8", skip="out_proj")
    layer_of_same = wf.nn.MultiheadAttention(width, 4, batch_first=True).eval()
    layer_of_same.in_proj_weight.copy_(layer.in_proj.weight)
    layer_of_same.in_proj_bias.copy_(bias)
    layer_of_same.out_proj = layer.out_proj
    assert relative_error(layer.in_proj.weight, weight.double()) < 0.01
    for key in (query, memory):
        for value in (key, key.clone()):
            torch.testing.assert_close(layer(query, key, value), layer_of_same(query, key, value))
