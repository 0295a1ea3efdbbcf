import math

import pytest
import torch

from tests.check import check, check_gradients, same_bits
from warpformer import InputError, ops

FORMS = pytest.mark.parametrize("interleaved", [False, True], ids=("half", "interleaved"))


def frequencies(rotated):
    return ops.rope_frequencies(rotated)[0] if rotated else torch.zeros(0, dtype=torch.float64)


def tables(rotated, length=100):
    return ops.rope_tables(frequencies(rotated), length, device=torch.get_default_device())


def rotate(x, cos, sin, interleaved):
    """The composition that models are written in, for cos and sin [..., T, R/2]."""
    cos, sin = (t.to(x.dtype)[..., None, :] for t in (cos, sin))
    rotated = 2 * cos.shape[-1]
    head, rest = x[..., :rotated], x[..., rotated:]
    if interleaved:
        a, b = head[..., ::2], head[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


@FORMS
@pytest.mark.parametrize(
    ("width", "rotated"), [(2, 2), (16, 16), (30, 30), (64, 64), (128, 128), (80, 32), (37, 20), (9, 0)]
)
def test_values(device, dtype, interleaved, width, rotated):
    cos, sin = tables(rotated)
    x = torch.randn(2, 23, 4096 // (46 * width) + 1, width, dtype=dtype)
    for judge in (check, check_gradients):
        judge(
            lambda x: ops.rope(x, cos, sin, interleaved=interleaved),
            lambda x: rotate(x, cos[:23], sin[:23], interleaved),
            x,
        )


@FORMS
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(23,), (2, 23), (2, 1), (1,)])
def test_positions(device, dtype, interleaved, index, shape):
    """Of every token, of a whole batch, of every row: broadcast."""
    cos, sin = tables(32)
    positions = torch.randint(100, shape, dtype=index)
    x = torch.randn(2, 23, 3, 32, dtype=dtype)
    for judge in (check, check_gradients):
        judge(
            lambda x: ops.rope(x, cos, sin, positions=positions, interleaved=interleaved),
            lambda x: rotate(x, cos[positions.long()], sin[positions.long()], interleaved),
            x,
        )


@FORMS
@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (6, 1), (1, 6), (9, 5)])
def test_query_and_key(device, dtype, interleaved, heads):
    cos, sin = tables(16)
    query, key = (torch.randn(2, 70, n, 24, dtype=dtype) for n in heads)
    together = ops.rope(query, cos, sin, key=key, interleaved=interleaved)
    for out, x in zip(together, (query, key), strict=True):
        assert same_bits(out, ops.rope(x, cos, sin, interleaved=interleaved))
    leaves = [t.clone().requires_grad_() for t in (query, key)]
    results = ops.rope(leaves[0], cos, sin, key=leaves[1], interleaved=interleaved)
    grads = [torch.randn_like(t) for t in results]
    both = torch.autograd.grad(results, leaves, grads, retain_graph=True)
    for result, leaf, grad, expected in zip(results, leaves, grads, both, strict=True):
        (alone,) = torch.autograd.grad(result, leaf, grad, retain_graph=True)  # the other one has none
        assert same_bits(alone, expected)


@FORMS
@pytest.mark.parametrize("shape", [(23, 4, 32), (2, 23, 4, 32), (2, 1, 3, 23, 4, 32)])
def test_heads_before_tokens(device, dtype, interleaved, shape):
    """A transposed view, and any other strides: the same bits."""
    cos, sin = tables(24)
    x = torch.randn(shape, dtype=dtype)
    expected = ops.rope(x, cos, sin, interleaved=interleaved)
    every_second = torch.stack([x, x], -1)[..., 0]
    for layout in (x.transpose(-3, -2).contiguous().transpose(-3, -2), every_second, x.mT.contiguous().mT):
        assert same_bits(ops.rope(layout, cos, sin, interleaved=interleaved), expected)


@FORMS
@pytest.mark.parametrize("width", [16, 20, 37])
def test_in_place(device, dtype, interleaved, width):
    cos, sin = tables(16)
    x = torch.randn(2, 23, 5, width, dtype=dtype)
    expected = ops.rope(x, cos, sin, interleaved=interleaved)
    copies = x.clone(), torch.stack([x, x], -1)[..., 0], x.transpose(1, 2).contiguous().transpose(1, 2)
    for copy in copies:
        assert ops.rope(copy, cos, sin, interleaved=interleaved, out=copy) is copy
        assert same_bits(copy, expected)


@pytest.mark.parametrize("other", [torch.float32, torch.bfloat16, torch.float16])
def test_out(device, dtype, other):
    cos, sin = tables(16)
    query, key = torch.randn(2, 23, 5, 20, dtype=dtype), torch.randn(2, 23, 1, 20, dtype=dtype)
    outs = tuple(torch.full(t.shape, torch.nan, dtype=other) for t in (query, key))
    results = ops.rope(query, cos, sin, key=key, out=outs)
    for out, result, expected in zip(outs, results, ops.rope(query, cos, sin, key=key), strict=True):
        assert result is out
        if other == dtype:
            assert same_bits(out, expected)
        else:
            torch.testing.assert_close(out.float(), expected.float(), rtol=0.02, atol=0.02)


def test_gradient_of_the_gradient(device):
    cos, sin = tables(16)
    x = torch.randn(2, 23, 5, 16, requires_grad=True)
    grad = torch.randn_like(x, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.rope(x, cos, sin), x, grad, create_graph=True)
    (back,) = torch.autograd.grad(dx, grad, x.detach())
    assert same_bits(back, ops.rope(x.detach(), cos, sin))


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 16), (2, 0, 4, 16), (0, 3, 4, 16), (1, 1, 16)])
def test_small_shapes(device, dtype, shape):
    x = torch.zeros(shape, dtype=dtype)
    assert same_bits(ops.rope(x, *tables(16)), x)


def test_position_outside_the_tables(device, request):
    """Refused where the op can see it; elsewhere NaN, and only there."""
    cos, sin = tables(16, 10)
    x, positions = torch.randn(1, 4, 2, 20), torch.tensor([[9, 10, -1, 0]])
    if request.node.callspec.params["device"] not in ("emulated", "cuda"):
        with pytest.raises(InputError, match=r"^rope: .* position = 10, cos = f32\[10,8\]"):
            ops.rope(x, cos, sin, positions=positions)
        return
    out = ops.rope(x, cos, sin, positions=positions)
    assert out[:, 1:3, :, :16].isnan().all()
    known = out[:, ::3]
    assert same_bits(known, ops.rope(x[:, ::3], cos, sin, positions=positions[:, ::3]))


def test_tables_at_a_million_positions():
    """Angles are exact where float32 ones would be off by a hundredth of a turn."""
    inv_freq, factor = ops.rope_frequencies(128, theta=500000.0)
    cos, sin = ops.rope_tables(inv_freq, 1_000_001, factor)
    position = 1_000_000
    for i, frequency in enumerate(inv_freq.tolist()):
        assert abs(cos[position, i].item() - math.cos(position * frequency)) < 1e-7
        assert abs(sin[position, i].item() - math.sin(position * frequency)) < 1e-7
    for wrong in (torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(InputError, match=r"^rope_tables: inv_freq"):
            ops.rope_tables(wrong, 3)
    with pytest.raises(InputError, match="length = -1"):
        ops.rope_tables(inv_freq, -1)
