"""T5's position biases in scaled_dot_product_attention, forward and backward."""

import math

import pytest
import torch

from tests.check import check, check_gradients, same_bits, threads
from tests.ops.test_attention_options import reference
from tests.ops.test_scaled_dot_product_attention import mask_of, qkv, starts
from warpformer import InputError, ops

OP = "scaled_dot_product_attention"
attention = ops.scaled_dot_product_attention

OPTIONS = {
    "bidirectional": {},
    "decoder": {"position_bidirectional": False, "is_causal": True},
    "bottom-right": {"alignment": "bottom-right", "position_max_distance": 70},
    "window": {"window": (100, 3)},
    "softcap": {"softcap": 2.0, "scale": 1.0},
    "beyond every distance": {"position_max_distance": 10_000},
}
SHORT, LONG = (2, 4, 61, 93, 24, 40), (1, 4, 150, 300, 64, 64)
CASES = [(SHORT, name) for name in OPTIONS] + [(LONG, "window"), (LONG, "bottom-right")]


def buckets_of(distance, buckets, bidirectional, max_distance):
    """T5's formula, with float32 for the logarithm as its authors' code has it."""
    first = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        first = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    wide = (distance.float() / exact).log() / math.log(max_distance / exact) * (buckets - exact)
    wide = (exact + wide.clamp(min=0).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, wide)


def biases(table, queries, keys, *, position_bidirectional=True, position_max_distance=128,
           alignment="top-left", **_):  # fmt: skip
    """[H, T, S]"""
    shift = keys - queries if alignment == "bottom-right" else 0
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - shift
    buckets = buckets_of(distance, table.shape[0], position_bidirectional, position_max_distance)
    return table[buckets].permute(2, 0, 1)


def with_matrix(options, mask=None):
    """The same by a matrix of biases as the mask: function(q, k, v, table) -> out."""
    rest = {name: value for name, value in options.items() if not name.startswith("position")}

    def function(q, k, v, table):
        bias = biases(table, q.shape[-2], k.shape[-2], **options)
        bias = bias if mask is None else bias + mask.to(bias.dtype)
        return reference(q, k, v, bias, **rest)[0]

    return function


@pytest.mark.parametrize(
    ("bidirectional", "buckets", "max_distance"),
    [
        *((True, *sizes) for sizes in [(4, 51), (5, 128), (8, 256), (32, 128), (64, 200), (100, 51)]),
        *((False, *sizes) for sizes in [(4, 200), (5, 51), (8, 128), (32, 128), (64, 256), (100, 51)]),
    ],
)
@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_buckets(device, bidirectional, buckets, max_distance, alignment):
    """Of every distance: query i sees the key that is i before the last one, so that lse is its bias. As many
    keys as queries show every second distance, one more key the others."""
    table = torch.arange(buckets, dtype=torch.float32)[:, None]
    queries = 300
    for keys in (queries, queries + 1):
        _, lse = attention(
            *(torch.zeros(1, 1, t, 1) for t in (queries, keys, keys)),
            torch.eye(keys, dtype=torch.bool).flip(-1)[:queries],
            position_bias=table,
            position_bidirectional=bidirectional,
            position_max_distance=max_distance,
            alignment=alignment,
            return_lse=True,
        )
        shift = keys - queries if alignment == "bottom-right" else 0
        distance = keys - 1 - 2 * torch.arange(queries) - shift
        expected = buckets_of(distance, buckets, bidirectional, max_distance)
        assert torch.equal(lse.flatten(), expected.float())


@pytest.mark.parametrize(("shape", "name"), CASES, ids=str)
def test_values(device, dtype, shape, name):
    options = OPTIONS[name]
    table = torch.randn(32, 4, dtype=dtype)
    check(lambda *t: attention(*t[:3], position_bias=t[3], **options), with_matrix(options),
          *qkv(*shape, dtype), table)  # fmt: skip


@pytest.mark.parametrize(("shape", "name"), CASES[:-1], ids=str)
def test_gradients(device, dtype, shape, name):
    options = OPTIONS[name]
    table = torch.randn(128, 4, dtype=dtype)  # many buckets: check_gradients draws less often
    check_gradients(lambda *t: attention(*t[:3], position_bias=t[3], **options), with_matrix(options),
                    *qkv(*shape, dtype), table)  # fmt: skip


@pytest.mark.parametrize("kind", ["padding", "bias"])
def test_beside_a_mask_with_shared_heads(device, kind):
    mask = mask_of(kind, 2, 4, 61, 93)
    additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) if kind == "padding" else mask

    def ours(q, k, v, table):
        return attention(q, k, v, mask, position_bias=table, enable_gqa=True)

    inputs = (*qkv(2, 4, 61, 93, 24, 40, kv_heads=2), torch.randn(128, 4))
    check(ours, with_matrix({}, additive), *inputs)
    check_gradients(ours, with_matrix({}, additive), *inputs)


def test_packed_sequences(device, dtype):
    """Bit by bit what each sequence gives alone; the table's gradient is the sum of theirs."""
    lengths_q, lengths_k = (5, 0, 300, 4, 1, 0, 200), (5, 3, 300, 0, 17, 0, 20)
    q = torch.randn(sum(lengths_q), 4, 24, dtype=dtype).requires_grad_()
    k = torch.randn(sum(lengths_k), 2, 24, dtype=dtype).requires_grad_()
    v = torch.randn(sum(lengths_k), 2, 40, dtype=dtype).requires_grad_()
    table = torch.randn(32, 4, requires_grad=True)
    options = {"position_bias": table, "enable_gqa": True, "alignment": "bottom-right"}
    out = attention(q, k, v, cu_seqlens_q=starts(lengths_q), cu_seqlens_k=starts(lengths_k), **options)
    grad = torch.randn_like(out)
    packed = torch.autograd.grad(out, (q, k, v, table), grad)
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    alone = [attention(*(t.transpose(0, 1) for t in part), **options).transpose(0, 1) for part in parts]
    assert same_bits(out, torch.cat(alone))
    single = torch.autograd.grad(torch.cat(alone), (q, k, v, table), grad)
    for a, b in zip(packed[:3], single[:3], strict=True):
        assert same_bits(a, b)
    torch.testing.assert_close(packed[3], single[3])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_same_bits_for_any_number_of_threads(device, dtype, kv_heads):
    leaves = [t.requires_grad_() for t in (*qkv(1, 4, 200, 700, 24, 24, dtype, kv_heads), torch.randn(32, 4))]
    grad = torch.randn(1, 4, 200, 24, dtype=dtype)
    found = []
    for count in (1, 2, 4):
        with threads(count):
            out = attention(*leaves[:3], position_bias=leaves[3], enable_gqa=True)
            found.append((out, *torch.autograd.grad(out, leaves, grad)))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_nothing_unseen_reaches_the_table(device):
    q, k, v = qkv(1, 2, 40, 300, 24, 24)
    keep = torch.ones(40, 300, dtype=torch.bool)
    keep[:, 250:] = False
    keep[3] = False
    grad = torch.randn(1, 2, 40, 24)
    table = torch.randn(32, 2, requires_grad=True)

    def gradient():
        return torch.autograd.grad(attention(q, k, v, keep, position_bias=table), table, grad)[0]

    clean = gradient()
    assert clean.isfinite().all()
    q[:, :, 3] = k[:, :, 250:] = v[:, :, 250:] = torch.nan
    assert same_bits(gradient(), clean)


@pytest.mark.parametrize(
    ("table", "options"),
    [
        (torch.zeros(32), {}),
        (torch.zeros(32, 3), {}),
        (torch.zeros(3, 2), {}),
        (torch.zeros(1, 2), {"position_bidirectional": False}),
        (torch.zeros(32, 2), {"position_max_distance": 8}),
        (torch.zeros(32, 2, dtype=torch.float64), {}),
    ],
)
def test_refuses(device, table, options):
    with pytest.raises(InputError, match=r"^scaled_dot_product_attention: .*position_bias = "):
        attention(*qkv(1, 2, 3, 4, 8, 8), position_bias=table, **options)
