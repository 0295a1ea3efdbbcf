import pytest
import torch

from tests.check import host_reads, relative_error, same_bits, threads
from tests.ops.test_position_bias import biases, buckets_of
from tests.ops.test_scaled_dot_product_attention import starts
from warpformer import _C, InputError, ops

BOUND = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 5e-4}
BOUND_INT8 = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}


def operands(lengths, slots, queries=1, heads=8, kv_heads=2, width=64, value_width=None, dtype=torch.float32):
    """Query, caches whose unused slots are NaN, and lengths."""
    batch, value_width = len(lengths), value_width or width
    q = torch.randn(batch, queries, heads, width, dtype=dtype)
    k = torch.randn(batch, slots, kv_heads, width, dtype=dtype)
    v = torch.randn(batch, slots, kv_heads, value_width, dtype=dtype)
    for b, n in enumerate(lengths):
        k[b, n:] = v[b, n:] = torch.nan
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


def reference(q, k, v, lengths, is_causal=True, scale=None, window=(None, None), softcap=0.0, slopes=None,
              sinks=None, position_bias=None, **position):  # fmt: skip
    """The definition, in float64: out and lse."""
    outs, sums = [], []
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b, n in enumerate(lengths.tolist()):
        query, key, value = (t.double().transpose(0, 1) for t in (q[b], k[b, :n], v[b, :n]))
        if len(key) == 1:  # a product with a matrix copies it for no head
            key, value = key[0], value[0]
        else:
            key, value = (t.repeat_interleave(len(query) // len(t), 0) for t in (key, value))
        s = scale * query @ key.mT
        s = softcap * torch.tanh(s / softcap) if softcap else s
        away = torch.arange(n) - (torch.arange(q.shape[1])[:, None] + n - q.shape[1])
        if slopes is not None:
            s = s - slopes.double()[:, None, None] * away.abs()
        if position_bias is not None:
            s = s + biases(position_bias.double(), *away.shape, alignment="bottom-right", **position)
        left, right = (1 << 40 if side is None else side for side in window)
        s = s.masked_fill((away < -left) | (away > (min(0, right) if is_causal else right)), -torch.inf)
        lse = torch.logsumexp(s, -1) if n else torch.full(s.shape[:-1], -torch.inf).double()
        if sinks is not None:
            lse = torch.where(lse.isneginf(), lse, torch.logaddexp(lse, sinks.double()[:, None]))
        weights = torch.where(lse.isneginf()[..., None], 0.0, (s - lse[..., None]).exp())
        outs.append((weights @ value).transpose(0, 1))
        sums.append(lse)
    return torch.stack(outs), torch.stack(sums)


def paged(cache, block_size):
    """The cache in blocks in reversed order, and its table."""
    batch, slots, *rest = cache.shape
    per_sequence = -(-slots // block_size)
    padded = cache.new_zeros(batch, per_sequence * block_size, *rest)
    padded[:, :slots] = cache
    blocks = padded.view(batch * per_sequence, block_size, *rest).flip(0).contiguous()
    table = torch.arange(batch * per_sequence - 1, -1, -1, dtype=torch.int32)
    return blocks, table.view(batch, per_sequence)


def quantized(cache):
    """int8 and scales, as append_to_cache_ makes them."""
    cache = cache.nan_to_num(0.0).float()
    scales = cache.abs().amax(-1) / 127
    return (cache / scales[..., None].clamp_min(1e-30)).round().to(torch.int8), scales


def as_int8(k, v, lengths):
    """The caches in int8, their scales (NaN in unused slots) as options, and what they are exactly."""
    (k, key_scales), (v, value_scales) = quantized(k), quantized(v)
    exact = [t.double() * scale.double()[..., None] for t, scale in ((k, key_scales), (v, value_scales))]
    for scales in (key_scales, value_scales):
        for b, n in enumerate(lengths.tolist()):
            scales[b, n:] = torch.nan
    return (k, v), {"key_scales": key_scales, "value_scales": value_scales}, exact


def is_emulated(request):
    """Then a test is of fewer or shorter sequences."""
    return request.node.callspec.params["device"] == "emulated"


SHAPES = [(1, 128), (1, 33), (3, 64), (3, 80), (16, 33), (17, 80), (9, 144)]  # queries, width


@pytest.mark.parametrize(("queries", "width"), SHAPES)
def test_values(device, dtype, queries, width):
    inputs = operands([613, 18, 256], 700, queries, width=width, value_width=width + 3, dtype=dtype)
    out, lse = ops.cached_attention(*inputs, return_lse=True)
    expected, sums = reference(*inputs)
    assert out.dtype == dtype
    assert relative_error(out, expected) < BOUND[dtype]
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("queries", "heads", "kv_heads"), [(2, 1, 1), (1, 4, 4), (1, 6, 2), (1, 5, 1), (2, 71, 1), (1, 40, 40)]
)
def test_shared_key_heads(device, dtype, queries, heads, kv_heads, int8):
    q, k, v, lengths = operands([300, 260], 300, queries, heads, kv_heads, 40, dtype=dtype)
    caches, scales, exact = as_int8(k, v, lengths) if int8 else ((k, v), {}, (k, v))
    bound = BOUND_INT8 if int8 else BOUND
    out = ops.cached_attention(q, *caches, lengths, **scales)
    assert relative_error(out, reference(q, *exact, lengths)[0]) < bound[dtype]


OPTIONS = {
    "full": {"is_causal": False},
    "scale": {"scale": -0.3},
    "window": {"window": (100, None)},
    "narrow window": {"window": (2, 0)},
    "both sides": {"window": (270, 3), "is_causal": False},
    "softcap": {"softcap": 2.0},
    "slopes": {"slopes": torch.rand(8)},
    "sinks": {"sinks": torch.randn(8)},
    "position bias": {
        "position_bias": torch.randn(32, 8),
        "position_bidirectional": False,
        "position_max_distance": 400,
        "scale": 1.0,
    },
    "cross-attention": {"position_bias": torch.randn(32, 8).half(), "scale": 1.0, "is_causal": False},
    "all": {
        "window": (200, None),
        "softcap": 3.0,
        "slopes": torch.rand(8) / 10,
        "sinks": torch.randn(8),
        "position_bias": torch.randn(6, 8).bfloat16(),
    },
}


@pytest.mark.parametrize(
    ("options", "queries", "int8"),
    [(name, 5, False) for name in OPTIONS]
    + [("position bias", 1, False), ("all", 1, False), ("all", 1, True)]
    + [("all", 5, True), ("both sides", 5, True)],
)
def test_options(device, dtype, options, queries, int8):
    q, k, v, lengths = operands([613, 3, 300], 640, queries, dtype=dtype)
    options = {n: t.to(q.device) if isinstance(t, torch.Tensor) else t for n, t in OPTIONS[options].items()}
    caches, scales, exact = as_int8(k, v, lengths) if int8 else ((k, v), {}, (k, v))
    ours = {("alibi_slopes" if name == "slopes" else name): value for name, value in options.items()}
    out, lse = ops.cached_attention(q, *caches, lengths, **scales, **ours, return_lse=True)
    expected, sums = reference(q, *exact, lengths, **options)
    bound, close = (BOUND_INT8, 1e-4) if int8 else (BOUND, 1e-5)
    assert relative_error(out, expected) < bound[dtype]
    torch.testing.assert_close(lse.double(), sums, rtol=close, atol=close)


@pytest.mark.parametrize(
    ("buckets", "bidirectional", "max_distance"), [(32, True, 128), (32, False, 128), (5, True, 900)]
)
def test_buckets(request, device, buckets, bidirectional, max_distance):
    """Of every distance: in sequence b all but slot b is nothing beside it, so that lse shows its bias."""
    slots = 150
    sequences = torch.arange(0, slots, 13 if is_emulated(request) else 1)
    k = torch.eye(slots)[sequences, :, None, None] * 4096
    q, lengths = torch.ones(len(k), slots, 1, 1), torch.full((len(k),), slots, dtype=torch.int32)
    _, lse = ops.cached_attention(
        *(q, k, k, lengths),
        position_bias=torch.arange(buckets, dtype=torch.float32)[:, None],
        position_bidirectional=bidirectional,
        position_max_distance=max_distance,
        is_causal=False,
        return_lse=True,
    )
    distance = sequences[:, None] - torch.arange(slots)
    assert torch.equal(lse[:, 0] - 4096, buckets_of(distance, buckets, bidirectional, max_distance).float())


@pytest.mark.parametrize("queries", [1, 5, 130])
@pytest.mark.parametrize("is_causal", [False, True])
def test_position_bias_as_in_scaled_dot_product_attention(device, queries, is_causal):
    q, k, v, lengths = operands([300], 300, queries)
    options = {
        "is_causal": is_causal,
        "position_bias": torch.randn(32, 8),
        "position_bidirectional": not is_causal,
    }
    expected = ops.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), **options, alignment="bottom-right", enable_gqa=True
    )
    torch.testing.assert_close(ops.cached_attention(q, k, v, lengths, **options), expected.transpose(1, 2))


@pytest.mark.parametrize(("block_size", "int8"), [(1, False), (7, True), (16, False), (300, True)])
def test_paged(device, dtype, block_size, int8):
    """Bit by bit what the contiguous cache gives; entries beyond the lengths are not read."""
    q, k, v, lengths = operands([613, 18, 0], 620, 3, dtype=dtype)
    (k, v), scales = (k, v), {}
    if int8:
        (k, v), scales, _ = as_int8(k, v, lengths)
    expected = ops.cached_attention(q, k, v, lengths, **scales)
    (k, table), (v, _) = paged(k, block_size), paged(v, block_size)
    scales = {name: paged(scale, block_size)[0] for name, scale in scales.items()}
    for b, n in enumerate(lengths.tolist()):
        table[b, -(-n // block_size) :] = 1 << 30
    assert same_bits(ops.cached_attention(q, k, v, lengths, block_table=table, **scales), expected)


@pytest.mark.parametrize("block_size", [None, 16])
def test_scales_in_bfloat16(device, dtype, block_size):
    """Give the bits of the same scales in float32."""
    q, k, v, lengths = operands([613, 18], 620, 3, dtype=dtype)
    (k, v), scales, _ = as_int8(k, v, lengths)
    rounded = {name: t.bfloat16() for name, t in scales.items()}
    expected = ops.cached_attention(q, k, v, lengths, **{n: t.float() for n, t in rounded.items()})
    table = None
    if block_size:
        (k, table), (v, _) = paged(k, block_size), paged(v, block_size)
        rounded = {name: paged(t, block_size)[0] for name, t in rounded.items()}
    assert same_bits(ops.cached_attention(q, k, v, lengths, block_table=table, **rounded), expected)


RAGGED = {
    "decode": ([1, 1, 1, 1], [613, 18, 256, 1]),
    "mixed": ([1, 70, 0, 5, 1, 300], [613, 70, 20, 258, 0, 299]),
    "nothing new": ([0, 0], [5, 0]),
}


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("is_paged", [False, True])
def test_packed(device, dtype, name, int8, is_paged):
    """Bit by bit what each sequence gives alone, with queries of its own number."""
    counts, lengths = RAGGED[name]
    q, k, v, sizes = operands(lengths, 620, max(counts), dtype=dtype)
    (k, v), scales, _ = as_int8(k, v, sizes) if int8 else ((k, v), {}, None)
    options = {"alibi_slopes": torch.rand(8), "sinks": torch.randn(8), "position_bias": torch.randn(32, 8)}
    options |= {"window": (200, None), "return_lse": True}
    queries = [q[b, :count] for b, count in enumerate(counts)]
    alone = [
        ops.cached_attention(
            *(queries[b][None], k[b : b + 1], v[b : b + 1], sizes[b : b + 1]),
            **{name: t[b : b + 1] for name, t in scales.items()},
            **options,
        )
        for b in range(len(counts))
    ]
    if is_paged:
        (k, options["block_table"]), (v, _) = paged(k, 16), paged(v, 16)
        scales = {name: paged(t, 16)[0] for name, t in scales.items()}
    out, lse = ops.cached_attention(
        *(torch.cat(queries), k, v, sizes), cu_seqlens_q=starts(counts), **scales, **options
    )
    assert same_bits(out, torch.cat([o[0] for o, _ in alone]))
    assert same_bits(lse, torch.cat([sums[0] for _, sums in alone], -1))


def test_packed_for_any_threads(request, device):
    counts, lengths = RAGGED["decode" if is_emulated(request) else "mixed"]
    q, k, v, sizes = operands(lengths, 620, max(counts))
    q = torch.cat([q[b, :count] for b, count in enumerate(counts)])
    found = []
    for count in (1, 2, 5):
        with threads(count):
            found.append(ops.cached_attention(q, k, v, sizes, cu_seqlens_q=starts(counts)))
    assert all(same_bits(out, found[0]) for out in found)


@pytest.mark.parametrize(("queries", "width"), SHAPES)
def test_int8(device, dtype, queries, width):
    """Against float64 on the same int8."""
    q, k, v, lengths = operands([613, 18, 256], 700, queries, width=width, dtype=dtype)
    caches, scales, exact = as_int8(k, v, lengths)
    out = ops.cached_attention(q, *caches, lengths, **scales)
    assert relative_error(out, reference(q, *exact, lengths)[0]) < BOUND_INT8[dtype]


def test_scales_of_int8(device, dtype):
    """Those that are not seen do not leak, one that is NaN shows, and a negative one is a scale too."""
    q, k, v, lengths = operands([300], 300, 4, dtype=dtype)
    (k, v), scales, exact = as_int8(k, v, lengths)
    scales["value_scales"][:, ::2] *= -1
    exact[1][:, ::2] *= -1
    out = ops.cached_attention(q, k, v, lengths, **scales, window=(20, None))
    assert relative_error(out, reference(q, *exact, lengths, window=(20, None))[0]) < BOUND_INT8[dtype]
    for t in scales.values():
        t[0, :276] = torch.nan  # the first query sees slots 276 to 296
    assert same_bits(ops.cached_attention(q, k, v, lengths, **scales, window=(20, None)), out)
    for name in scales:
        shown = {**scales, name: scales[name].clone()}
        shown[name][0, 297, 0] = torch.nan
        heads = ops.cached_attention(q, k, v, lengths, **shown, window=(20, None)).isnan().all(-1)[0]
        assert heads.tolist() == [[t > 0 and h < 4 for h in range(8)] for t in range(4)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_queries_that_are_not_finite(device, dtype, bad):
    q, k, v, lengths = operands([300], 300, 2, dtype=dtype)
    (k, v), scales, _ = as_int8(k, v, lengths)
    clean = ops.cached_attention(q, k, v, lengths, **scales)
    q[0, 1, 3, 5] = bad
    out = ops.cached_attention(q, k, v, lengths, **scales)
    assert out[0, 1, 3].isnan().all()
    out[0, 1, 3] = clean[0, 1, 3]
    assert same_bits(out, clean)


@pytest.mark.parametrize("int8", [False, True])
def test_same_bits_for_any_threads_and_alone(device, dtype, int8):
    lengths = [1300, 5, 700]
    q, k, v, sizes = operands(lengths, 1300, 2, dtype=dtype)
    (k, v), scales, _ = as_int8(k, v, sizes) if int8 else ((k, v), {}, None)
    with threads(1):
        expected = ops.cached_attention(q, k, v, sizes, **scales)
    for count in (2, 4):
        with threads(count):
            assert same_bits(ops.cached_attention(q, k, v, sizes, **scales), expected)
    for b, n in enumerate(lengths):
        query, size = q[b : b + 1], sizes[b : b + 1]
        own = [t[b : b + 1, :n] for t in (k, v)]
        own_scales = {name: t[b : b + 1, :n] for name, t in scales.items()}
        assert same_bits(ops.cached_attention(query, *own, size, **own_scales)[0], expected[b])


def test_empty_sequences(device, dtype):
    q, k, v, lengths = operands([0, 3, 0], 20, 5, dtype=dtype)
    out, lse = ops.cached_attention(q, k, v, lengths, sinks=torch.zeros(8), return_lse=True)
    assert out.isfinite().all()
    assert (out[[0, 2]] == 0).all()
    assert lse[[0, 2]].isneginf().all()
    assert (out[1, :2] == 0).all()  # the first two of five queries come before the first of three slots
    assert lse[1, :, :2].isneginf().all()
    assert not out[1, 2:].eq(0).any(-1).any()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_what_is_not_seen_does_not_leak(device, dtype, garbage, operand):
    q, k, v, lengths = operands([300], 300, 4, dtype=dtype)
    clean = ops.cached_attention(q, k, v, lengths, window=(20, None))
    hidden = k if operand == "key" else v
    hidden[0, 297:] = garbage  # the first query is at 296
    hidden[0, :276] = garbage
    out = ops.cached_attention(q, k, v, lengths, window=(20, None))
    assert same_bits(out[:, 0], clean[:, 0])
    assert not out[:, 1:].isfinite().all(-1).any()


def test_scores_beyond_the_range_of_exp(device, dtype):
    q, k, v, lengths = operands([700, 513], 700, 16, width=32, dtype=dtype)
    q, k = 60 * q, 60 * k
    out, (expected, lse) = ops.cached_attention(q, k, v, lengths), reference(q, k, v, lengths)
    assert lse.abs().max() > 1e4
    assert relative_error(out, expected) < {torch.float32: 1e-3}.get(dtype, BOUND[dtype])


@pytest.mark.parametrize("size", [0, 1, 15, 17, 255, 256, 257, 513])
def test_sizes(device, size):
    for inputs in (operands([size], size), operands([9], 9, width=size, value_width=5)):
        torch.testing.assert_close(
            ops.cached_attention(*inputs),
            reference(*inputs, scale=max(inputs[0].shape[-1], 1) ** -0.5)[0].float(),
        )
    assert ops.cached_attention(*operands([], 5)).shape == (0, 1, 8, 64)


def test_heads_before_slots(device, dtype):
    """A cache [B, G, S, D], transposed: the same bits."""
    q, k, v, lengths = operands([613, 18], 700, 3, dtype=dtype)
    views = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    assert same_bits(ops.cached_attention(q, *views, lengths), ops.cached_attention(q, k, v, lengths))


@pytest.mark.parametrize(("queries", "heads"), [(1, 16), (3, 16), (1, 128)])
def test_latent(request, device, dtype, queries, heads):
    """DeepSeek's latent attention: one head of keys for all, whose first columns are the values."""
    q, k, _, lengths = operands(
        [300 if is_emulated(request) else 700, 257], 700, queries, heads, 1, 576, dtype=dtype
    )
    inputs = (q, k, k[..., :512], lengths)
    out, lse = ops.cached_attention(*inputs, return_lse=True)
    expected, sums = reference(*inputs)
    assert relative_error(out, expected) < BOUND[dtype]
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)
    assert same_bits(ops.cached_attention(q, k, k[..., :512].contiguous(), lengths), out)
    few = ops.cached_attention(q[:, :, 3:8], *inputs[1:])  # whatever other heads there are
    assert same_bits(few, out[:, :, 3:8])


def test_many_sequences_at_once(device):
    """More partial results than are held at a time."""
    q, k, v, length = operands([4096], 4096, heads=64, kv_heads=8)
    lengths = torch.cat([torch.ones(69, dtype=torch.int32), length])
    out = ops.cached_attention(*(t.expand(70, -1, -1, -1) for t in (q, k, v)), lengths)
    assert same_bits(out[69:], ops.cached_attention(q, k, v, length))
    assert same_bits(out[:69], v[:, :1].repeat_interleave(8, 2).expand(69, -1, -1, -1))


@pytest.mark.parametrize("int8", [False, True])
def test_many_short_sequences(device, dtype, int8):
    """So many that a block of a GPU takes all splits of one: the bits of those that are long, alone."""
    batch, longest = 520, 600
    q, k, v, length = operands([longest], longest, heads=16, kv_heads=8, dtype=dtype)
    (k, v), scales, _ = as_int8(k, v, length) if int8 else ((k, v), {}, None)
    lengths = torch.arange(batch, dtype=torch.int32) % 3
    lengths[[7, batch - 1]] = longest
    many = [t.expand(batch, *t.shape[1:]) for t in (q, k, v)]
    many_scales = {name: t.expand(batch, *t.shape[1:]) for name, t in scales.items()}
    out, lse = ops.cached_attention(*many, lengths, **many_scales, sinks=torch.ones(16), return_lse=True)
    alone, alone_lse = ops.cached_attention(
        *(q, k, v, length), **scales, sinks=torch.ones(16), return_lse=True
    )
    for b in (7, batch - 1):
        assert same_bits(out[b], alone[0])
        assert same_bits(lse[b], alone_lse[0])
    assert (out[lengths == 0] == 0).all()
    assert lse[lengths == 0].isneginf().all()
    assert out[lengths > 0].isfinite().all()


def test_lengths_and_blocks_outside(device):
    """Refused; on a GPU, where the host does not read them, the sequence is NaN and no other."""
    q, k, v, lengths = operands([5, 6], 6)
    if not host_reads(_C.cached_attention):
        expected = ops.cached_attention(q, k, v, lengths)
        for wrong in (7, -1, 1 << 30):
            out = ops.cached_attention(q, k, v, lengths.new_tensor([5, wrong]))
            assert same_bits(out[0], expected[0])
            assert out[1].isnan().all()
        for wrong in (2, -1, 1 << 30):
            table = torch.tensor([[0], [wrong]], dtype=torch.int32)
            out = ops.cached_attention(q, k, v, lengths, block_table=table)
            assert same_bits(out[0], expected[0])
            assert out[1].isnan().all()
        return
    for wrong in (7, -1):
        with pytest.raises(
            InputError, match=rf"^cached_attention: .* length = {wrong}, .*lengths = i32\[2\]"
        ):
            ops.cached_attention(q, k, v, lengths.new_tensor([5, wrong]))
    for wrong in (2, -1):
        table = torch.tensor([[0], [wrong]], dtype=torch.int32)
        with pytest.raises(InputError, match=rf"^cached_attention: .* block = {wrong}, block_table = i32"):
            ops.cached_attention(q, k, v, lengths, block_table=table)


def test_wider_than_on_a_gpu(device):
    inputs = operands([3], 3, width=641)
    if host_reads(_C.cached_attention):
        assert relative_error(ops.cached_attention(*inputs), reference(*inputs)[0]) < BOUND[torch.float32]
        return
    with pytest.raises(InputError, match=r"^cached_attention: .* query = f32\[1,1,8,641\]"):
        ops.cached_attention(*inputs)


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed):
    q, k, v, lengths = operands([30, 8], 40, 5)
    cu_seqlens = starts([4, 1]) if packed else None
    q = q[0] if packed else q
    options = (0.3, 0.0, 1 << 40, 0, True, 128, True)
    args = (q, k, v, lengths, cu_seqlens, None, None, None, None, None, torch.randn(32, 8), *options)
    torch.library.opcheck(torch.ops.warpformer.cached_attention.default, args)
