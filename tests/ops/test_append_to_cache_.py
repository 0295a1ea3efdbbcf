import pytest
import torch

from tests.check import host_reads, same_bits, threads
from tests.ops.test_cached_attention import paged
from tests.ops.test_scaled_dot_product_attention import starts
from warpformer import _C, InputError, ops


def caches(dtype, batch=3, slots=50, heads=2, width=36):
    k, v = torch.zeros(2, batch, slots, heads, width).to(dtype)
    scales = torch.zeros(2, batch, slots, heads) if dtype == torch.int8 else (None, None)
    return [k, v, *scales]


def tokens(count, dtype=torch.float32, batch=3, heads=2, width=36):
    return torch.randn(2, batch, count, heads, width, dtype=dtype)


def in_use():
    """The lengths before the call."""
    return torch.tensor([0, 17, 33], dtype=torch.int32)


def expected_cache(new, cache):
    out = cache.clone()
    for b, n in enumerate(in_use().tolist()):
        out[b, n : n + new.shape[1]] = new[b]
    return out


@pytest.mark.parametrize("count", [0, 1, 3, 17])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(device, dtype, count, cache_dtype):
    key, value = tokens(count, dtype)
    k, v, *_ = caches(cache_dtype)
    expected = [expected_cache(new.to(cache_dtype), cache) for new, cache in ((key, k), (value, v))]
    assert ops.append_to_cache_(key, value, k, v, in_use()) is None
    assert same_bits(k, expected[0])
    assert same_bits(v, expected[1])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30, 0.0])
def test_int8(device, dtype, magnitude, scale_dtype):
    if dtype == torch.float16 and magnitude != 0.0:
        magnitude = magnitude ** (1 / 15)
    key, value = magnitude * tokens(5, dtype)
    k, v, *scales = caches(torch.int8)
    key_scales, value_scales = (t.to(scale_dtype) for t in scales)
    ops.append_to_cache_(key, value, k, v, in_use(), key_scales=key_scales, value_scales=value_scales)
    for new, cache, scales in ((key, k, key_scales), (value, v, value_scales)):
        scale = (new.float().abs().amax(-1) / 127).to(scale_dtype)
        torch.testing.assert_close(scales, expected_cache(scale, torch.zeros_like(scales)), rtol=1e-6, atol=0)
        back = cache.double() * scales.double()[..., None]
        error = (back - expected_cache(new.double(), torch.zeros_like(back))).abs()
        assert (error <= 0.5001 * scales.double()[..., None]).all()


def test_nan_and_infinity_in_int8(device):
    for bad in (torch.nan, torch.inf):
        key, value = tokens(1)
        key[1, 0, 1, 3] = bad
        k, v, key_scales, value_scales = caches(torch.int8)
        ops.append_to_cache_(key, value, k, v, in_use(), key_scales=key_scales, value_scales=value_scales)
        assert key_scales[1, 17, 1].isnan()
        assert key_scales.isnan().sum() == 1


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
def test_paged(device, block_size, cache_dtype):
    key, value = tokens(9)
    flat, table = caches(cache_dtype), None
    blocks = []
    for cache in flat:
        if cache is not None:
            cache, table = paged(cache, block_size)
        blocks.append(cache)
    names = ("key_scales", "value_scales")
    ops.append_to_cache_(key, value, *flat[:2], in_use(), **dict(zip(names, flat[2:], strict=True)))
    ops.append_to_cache_(
        key, value, *blocks[:2], in_use(), block_table=table, **dict(zip(names, blocks[2:], strict=True))
    )
    for cache, block in zip(flat, blocks, strict=True):
        if cache is not None:
            assert same_bits(block, paged(cache, block_size)[0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("queries", [False, True])
def test_rope(device, dtype, interleaved, queries):
    """What rope and append_to_cache_ give one after the other."""
    cos, sin = ops.rope_tables(ops.rope_frequencies(20)[0], 60)
    key, value = tokens(4, dtype)
    query = torch.randn(3, 4, 6, 36, dtype=dtype) if queries else None
    positions = in_use()[:, None] + torch.arange(4, dtype=torch.int32)
    k, v, *_ = caches(dtype)
    rotated = ops.append_to_cache_(
        key, value, k, v, in_use(), query=query, cos=cos, sin=sin, interleaved=interleaved
    )
    options = {"positions": positions, "interleaved": interleaved}
    assert same_bits(k, expected_cache(ops.rope(key, cos, sin, **options), torch.zeros_like(k)))
    assert same_bits(v, expected_cache(value, torch.zeros_like(v)))
    if queries:
        assert same_bits(rotated, ops.rope(query, cos, sin, **options))
    else:
        assert rotated is None


COUNTS = [5, 0, 9]


def packed(t):
    return torch.cat([t[b, :count] for b, count in enumerate(COUNTS)])


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("rope", [False, True])
def test_packed(device, dtype, cache_dtype, is_paged, rope):
    """What each sequence's own call gives; no other slot changes."""
    key, value = tokens(9, dtype)
    query = torch.randn(3, 9, 6, 36, dtype=dtype) if rope else None
    cos, sin = ops.rope_tables(ops.rope_frequencies(20)[0], 60) if rope else (None, None)
    names, expected, table = ("key_scales", "value_scales"), caches(cache_dtype), None
    queries = []
    for b, count in enumerate(COUNTS):
        own = [None if t is None else t[b : b + 1] for t in expected]
        new = [t if t is None else t[b : b + 1, :count] for t in (key, value, query)]
        scales = dict(zip(names, own[2:], strict=True))
        queries.append(
            ops.append_to_cache_(
                *new[:2], *own[:2], in_use()[b : b + 1], query=new[2], cos=cos, sin=sin, **scales
            )
        )
    found = caches(cache_dtype)
    if is_paged:
        found, table = [t if t is None else paged(t, 7)[0] for t in found], paged(found[0], 7)[1]
        expected = [t if t is None else paged(t, 7)[0] for t in expected]
    rotated = ops.append_to_cache_(
        *(packed(key), packed(value), *found[:2], in_use()),
        cu_seqlens=starts(COUNTS),
        block_table=table,
        **dict(zip(names, found[2:], strict=True)),
        **{"query": packed(query) if rope else None, "cos": cos, "sin": sin},
    )
    assert all(a is b is None or same_bits(a, b) for a, b in zip(found, expected, strict=True))
    if rope:
        assert same_bits(rotated, torch.cat([t[0] for t in queries]))


def test_packed_for_any_threads(device):
    counts = [300, 0, 1, 40]
    key, value = torch.randn(2, sum(counts), 2, 36)
    lengths, found = torch.tensor([1, 2, 3, 4]).int(), []
    for count in (1, 2, 5):
        with threads(count):
            cache = torch.zeros(2, 4, 400, 2, 36)
            ops.append_to_cache_(key, value, *cache, lengths, cu_seqlens=starts(counts))
            found.append(cache)
    assert all(torch.equal(cache, found[0]) for cache in found)


def test_any_number_of_threads_and_strides(device, dtype):
    key, value = tokens(17, dtype, batch=3, heads=40, width=128)
    expected = caches(torch.int8, heads=40, width=128)
    names = ("key_scales", "value_scales")
    with threads(1):
        ops.append_to_cache_(
            key, value, *expected[:2], in_use(), **dict(zip(names, expected[2:], strict=True))
        )
    every_second = [torch.stack([t, t], -1)[..., 0] for t in (key, value)]
    for count, new in ((2, (key, value)), (3, every_second)):
        with threads(count):
            result = caches(torch.int8, heads=40, width=128)
            ops.append_to_cache_(*new, *result[:2], in_use(), **dict(zip(names, result[2:], strict=True)))
        assert all(map(same_bits, result, expected))


def test_slots_and_blocks_outside(device):
    """On a GPU, where the host does not read them, what has no place is not written."""
    if host_reads(_C.append_to_cache_):
        return  # test_refused_without_a_write
    key, value = tokens(18)
    k, v, *_ = caches(torch.float32)
    (k2, table), (v2, _) = paged(k, 16), paged(v, 16)
    ops.append_to_cache_(key, value, k, v, in_use())
    expected = expected_cache(key[:, :17], torch.zeros_like(k))
    expected[0, 17], expected[1, 34] = key[0, 17], key[1, 17]
    assert same_bits(k, expected)
    table[2, 2] = 99
    ops.append_to_cache_(key[:, :5], value[:, :5], k2, v2, in_use(), block_table=table)
    assert (k2[paged(k, 16)[1][2, 2]] == 0).all()
    ops.append_to_cache_(key[0], value[0], k, v, in_use(), cu_seqlens=starts([9, -1, 100]))


def test_refused_without_a_write(device):
    if not host_reads(_C.append_to_cache_):
        return  # test_slots_and_blocks_outside
    key, value = tokens(18)
    k, v, *_ = caches(torch.float32)
    with pytest.raises(
        InputError, match=r"^append_to_cache_: .* length = 33, tokens = 18, lengths = i32\[3\]"
    ):
        ops.append_to_cache_(key, value, k, v, in_use())
    (k2, table), (v2, _) = paged(k, 16), paged(v, 16)
    table[2, 2] = 99
    with pytest.raises(InputError, match=r"^append_to_cache_: .* block = 99, block_table = i32\[3,4\]"):
        ops.append_to_cache_(key[:, :5], value[:, :5], k2, v2, in_use(), block_table=table)
    cos, sin = ops.rope_tables(ops.rope_frequencies(20)[0], 34)
    with pytest.raises(InputError, match=r"^rope: .* position = 34"):
        ops.append_to_cache_(key[:, :5], value[:, :5], k, v, in_use(), cos=cos, sin=sin)
    with pytest.raises(InputError, match=r"^append_to_cache_: .* length = 33, tokens = 18"):
        ops.append_to_cache_(key[0], value[0], k, v, in_use(), cu_seqlens=starts([0, 0, 18]))
    for counts, rope in (([9, 9], {}), ([9, -1, 10], {}), ([9, 0, 8], {"cos": cos, "sin": sin})):
        with pytest.raises(InputError, match=r"^append_to_cache_: .*cu_seqlens = i32"):
            ops.append_to_cache_(key[0], value[0], k, v, in_use(), cu_seqlens=starts(counts), **rope)
    for wrong in ({"cos": cos}, {"query": key}):
        with pytest.raises(InputError, match=r"^append_to_cache_: cos and sin"):
            ops.append_to_cache_(key[:, :5], value[:, :5], k, v, in_use(), **wrong)
    with pytest.raises(InputError, match=r"^append_to_cache_: .* key_cache = i8"):
        ops.append_to_cache_(key[:, :5], value[:, :5], k.to(torch.int8), v.to(torch.int8), in_use())
    assert all((t == 0).all() for t in (k, v, k2, v2))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("is_packed", [False, True])
def test_registration(rope, cache_dtype, is_packed):
    k, v, *scales = caches(cache_dtype)
    tables = ops.rope_tables(ops.rope_frequencies(20)[0], 60) if rope else (None, None)
    query = torch.randn(3, 4, 6, 36) if rope else None
    key, value = tokens(4)
    if is_packed:
        key, value, query = (t if t is None else t.flatten(0, 1) for t in (key, value, query))
    cu_seqlens = starts([5, 0, 7]) if is_packed else None
    args = (key, value, k, v, in_use(), cu_seqlens, None, *scales, query, *tables, False)
    torch.library.opcheck(torch.ops.warpformer.append_to_cache_.default, args)


def test_compile():
    def step(key, value, k, v):
        ops.append_to_cache_(key, value, k, v, in_use())
        return ops.cached_attention(key, k, v, in_use() + 4)

    key, value = tokens(4)
    k, v, *_ = caches(torch.float32)
    compiled, own = (k.clone(), v.clone()), (k.clone(), v.clone())
    torch._dynamo.reset()
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(key, value, *compiled)
    assert same_bits(out, step(key, value, *own))
    assert all(map(same_bits, compiled, own))


def test_no_gradient():
    key, value = tokens(1)
    k, v, *_ = caches(torch.float32)
    with pytest.raises(NotImplementedError, match=r"^warpformer.ops.append_to_cache_ is forward only"):
        ops.append_to_cache_(key.requires_grad_(), value, k, v, in_use())
