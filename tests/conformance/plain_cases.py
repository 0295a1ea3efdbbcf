"""Cases of threads.cu, memory.cu and math.cu."""

import math as libm
from collections.abc import Iterator

import numpy as np

from tests.conformance.case import Case, from_bf16, to_bf16, to_f16, to_tf32


def threads() -> Iterator[Case]:
    g = np.random.default_rng(1)
    yield _positions()
    yield from _shuffles(g)
    for name, share in (("some", 0.5), ("none", 0.0), ("every", 1.0)):
        yield _votes(name, (g.random(128) < share).astype(np.int32))
    yield _barriers()
    yield _reductions(g)
    yield from _atomics(g)


def _positions() -> Case:
    y, x, t = np.meshgrid(np.arange(2), np.arange(3), np.arange(96), indexing="ij")
    columns = (t, t % 32, t // 32, t * 0 + 96, x, y, t * 0 + 3, t * 0 + 2)
    expected = np.stack(columns, -1).reshape(-1, 8).astype(np.int32)
    return Case("positions", "positions", np.zeros_like(expected), expected)


def _shuffles(g) -> Iterator[Case]:
    lane, warp = np.arange(64) % 32, np.arange(64) // 32 * 32
    for dtype in (np.float32, np.int32, np.uint32, np.int64):
        values = g.integers(0, 1 << 31, 64).astype(dtype)
        if dtype == np.int64:
            values = values << 31
        for operand in (0, 1, 13, 31):
            sources = (
                np.full(64, operand),
                lane ^ operand,
                np.where(lane >= operand, lane - operand, lane),
                np.where(lane + operand < 32, lane + operand, lane),
            )
            expected = np.stack([values[warp + source] for source in sources])
            name = "float" if dtype == np.float32 else np.dtype(dtype).name
            yield Case(
                f"shuffle_{name}_{operand}",
                f"shuffle_{name}",
                np.zeros_like(expected),
                expected,
                [values],
                [operand],
            )


def _votes(name: str, predicate: np.ndarray) -> Case:
    expected = np.zeros((128, 8), np.uint32)
    warps = predicate.reshape(4, 32)
    expected[:, 0] = warps.any(1).repeat(32)
    expected[:, 1] = warps.all(1).repeat(32)
    expected[:, 2] = (warps.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(1).repeat(32)
    expected[:, 3:6] = predicate.any(), predicate.all(), predicate.sum()
    expected[:, 6] = 1
    expected[:, 7] = warps.sum(1).repeat(32)
    return Case(f"votes_{name}", "votes", np.zeros_like(expected), expected, [predicate])


def _barriers() -> Case:
    x = np.arange(128, dtype=np.int32) * 3 + 7
    result = np.zeros(128, np.int32)
    rounds = [x[31::-1] + r for r in range(3)]
    result[32:64] = 100 * rounds[0] + 10 * rounds[1] + rounds[2]
    result[64:] = x[64:].reshape(2, 32)[::-1].reshape(-1)
    expected = np.ascontiguousarray(result.reshape(4, 32)[:, ::-1]).reshape(-1)
    return Case("barriers", "barriers", np.zeros(128, np.int32), expected, [x])


def _reductions(g) -> Case:
    x = g.integers(-1000, 1000, 96).astype(np.float32)  # exact in any order
    warps = x.reshape(3, 32)
    rows = (warps.sum(1).repeat(32), warps.max(1).repeat(32), np.full(96, x.sum()), np.full(96, x.max()))
    expected = np.stack(rows).astype(np.float32)
    return Case("reductions", "reductions", np.zeros_like(expected), expected, [x])


def _atomics(g) -> Iterator[Case]:
    x = g.integers(-1000, 1000, 256).astype(np.int32)

    def words(x):
        return [x.sum(), max(x.max(), 0), min(x.min(), 0), 7, 7 * (x.size - 1), 2 * x.size]

    expected = np.concatenate([words(x), *[words(block) for block in x.reshape(4, 64)]]).astype(np.int32)
    yield Case("atomics", "atomics", np.zeros_like(expected), expected, [x])

    u = g.integers(0, 1 << 24, 256).astype(np.uint32)
    low, start = int((u & 255).sum()), np.zeros(48, np.uint8)
    start[16:20] = 255  # the minimum
    wide = np.array([u.astype(np.uint64).sum() << np.uint64(20)], np.uint64)
    parts = (
        np.array([low, low], np.float32),
        np.array([u.sum(dtype=np.uint32), u.max(), u.min(), 0], np.uint32),
        wide,
        np.array([low, 0], np.int32),
        wide,
    )
    expected = np.concatenate([part.view(np.uint8) for part in parts])
    yield Case("more_atomics", "more_atomics", start, expected, [u])

    sums = np.zeros((4, 2), np.float32)
    for thread in range(64):
        sums[thread % 4] += 2 * (thread % 8), -2
    for name, encode in (("f16", to_f16), ("bf16", to_bf16)):
        kernel = f"red_add2_{name}"
        needs = "sm_90" if name == "bf16" else "sm_80"
        yield Case(kernel, kernel, np.zeros((4, 2), np.uint16), encode(sums), needs=needs)
    expected = np.array([1, 1, 1, 1, 3, 6], np.int32)
    yield Case("relay", "relay", np.zeros(6, np.int32), expected)


def memory() -> Iterator[Case]:
    g = np.random.default_rng(2)
    x = g.integers(0, 256, (64, 16)).astype(np.uint8)
    other = x[np.arange(64) ^ 1]
    expected = np.ascontiguousarray(other[:, ::-1])
    expected[:, 3] = other[:, 5]
    yield Case("vectors", "vectors", np.zeros_like(x), expected, [x])

    x = g.integers(0, 256, (4, 256)).astype(np.uint8)
    expected = np.zeros_like(x)
    for part, dtype in enumerate((np.uint8, np.uint16, np.uint32, np.uint64)):
        expected[part].view(dtype)[:32] = x[part].view(dtype)[:32][::-1]
    yield Case("scalars", "scalars", np.zeros_like(x), expected, [x])

    x = g.integers(0, 256, (3, 1280)).astype(np.uint8)
    expected = x.copy()
    for stage in range(3):
        skipped = (np.arange(64) + stage) % 3 == 0
        expected[stage, :1024].reshape(64, 16)[skipped] = 0
        expected[stage, 1024:].reshape(64, 4)[skipped] = 0
        expected[stage, :1024] = expected[stage, np.arange(1024) ^ 16]
    yield Case("async_copies", "async_copies", np.zeros_like(x), expected, [x])

    ones = np.ones((4, 64), np.int32)
    yield Case("barrier_phases", "barrier_phases", 0 * ones, ones)
    u = g.integers(0, 1 << 32, (2, 64)).astype(np.uint32)
    reversed_rows = np.ascontiguousarray(u[:, ::-1])
    yield Case("barrier_after_copies", "barrier_after_copies", 0 * u, reversed_rows, [u])


def math() -> Iterator[Case]:
    yield from _approximate()
    yield from _accurate()
    yield from _conversions()


def _ulp(y: np.ndarray) -> np.ndarray:
    return np.spacing(np.maximum(np.abs(y), 2.0**-126).astype(np.float32)).astype(np.float64)


def _values(case: str, x: np.ndarray, exact: np.ndarray, bound: np.ndarray | None, shape=None) -> Case:
    """float32 in and out; the expected values are rounded, which the bound allows for."""
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32)
    if bound is not None:
        finite = np.isfinite(expected)
        bound = np.where(finite, bound + 0.5 * _ulp(np.where(finite, expected, 0)), 0.0)
    return Case(case, case, np.zeros(expected.shape, np.float32), expected, [x], bound=bound)


def _approximate() -> Iterator[Case]:
    g = np.random.default_rng(3)
    special_values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0], np.float32)

    def points(low, high):
        return np.concatenate([g.uniform(low, high, 249).astype(np.float32), special_values])

    def positive():
        return np.abs(np.concatenate([2.0 ** points(-100, 100)[:249], special_values])).astype(np.float32)

    with np.errstate(all="ignore"):
        x = points(-120, 120)
        y = np.exp2(x.astype(np.float64))
        yield _values("exp2_approx", x, y, y * 2.0**-22)
        x = np.concatenate([positive()[:128], points(0.5, 2)[121:]])
        y = np.log2(x.astype(np.float64))
        near = (x > 0.5) & (x < 2)
        yield _values("log2_approx", x, y, 2.0**-22 * np.where(near, 1.0, np.abs(y)))
        x = points(-120, 120)
        y = 1 / x.astype(np.float64)
        yield _values("rcp_approx", x, y, np.abs(y) * 2.0**-23)
        x = positive()
        y = 1 / np.sqrt(x.astype(np.float64))
        yield _values("rsqrt_approx", x, y, y * 2.0**-22.9)
        x = points(-6, 6)
        y = np.tanh(x.astype(np.float64))
        yield _values("tanh_approx", x, y, np.abs(y) * 2.0**-11)


def _accurate() -> Iterator[Case]:
    g = np.random.default_rng(4)
    x = np.concatenate([g.normal(0, 3, 250), [0.0, 1.0, -1.0, 20.0, -20.0, 1e-3]]).astype(np.float32)
    wide = x.astype(np.float64)
    positive = np.abs(x) + np.float32(2.0**-20)
    functions = (
        ("exp", x, np.exp(wide)),
        ("log", positive, np.log(positive.astype(np.float64))),
        ("log1p", positive, np.log1p(positive.astype(np.float64))),
        ("erf", x, np.array([libm.erf(v) for v in wide])),
        ("tanh", x, np.tanh(wide)),
    )
    for name, argument, y in functions:
        yield _values(name, argument, y, 2 * _ulp(y))
    yield _values("sqrt", positive, np.sqrt(positive), None)
    yield _values("rsqrt", positive, 1 / np.sqrt(positive.astype(np.float64)), None)
    yield _values("abs", x, np.abs(x), None)
    pairs = np.concatenate([g.normal(0, 3, (62, 2)), [[np.nan, 1], [2, np.nan]]]).astype(np.float32)
    a, b = pairs.T
    yield _values("max", pairs, np.fmax(a, b), None)
    yield _values("min", pairs, np.fmin(a, b), None)
    pairs = pairs[:62]
    a, b = pairs.astype(np.longdouble).T  # 64 bits hold the product and almost all of the sum
    yield _values("fma", pairs, a * b + a, None)


def _conversions() -> Iterator[Case]:
    g = np.random.default_rng(5)
    bits = np.arange(0, 65536, 37, dtype=np.uint16)
    half = bits.view(np.float16).astype(np.float32)
    keep = ~np.isnan(half)
    yield Case("f16_to_float", "f16_to_float", 0 * half[keep], half[keep], [bits[keep]])
    brain = from_bf16(bits[keep])
    yield Case("bf16_to_float", "bf16_to_float", 0 * brain, brain, [bits[keep]])
    x = g.normal(0, 1, 512) * 2.0 ** g.integers(-30, 20, 512)
    ties = (1 + np.arange(32) / 256) * 2.0 ** g.integers(-8, 8, 32)
    x = np.concatenate([x, ties, 1 + np.arange(32) / 2048, [0.0, -0.0, np.inf, -np.inf, 65520, 1e-8]])
    x = x.astype(np.float32)
    for name, encode in (("bf16", to_bf16), ("f16", to_f16), ("tf32", to_tf32)):
        numbers = x[np.isfinite(x)] if name == "tf32" else x
        y = encode(numbers)
        yield Case(f"float_to_{name}", f"float_to_{name}", 0 * y, y, [numbers])
    pairs = x[:512].reshape(-1, 2)
    packed = pairs.copy()
    for name, encode, decode in (
        ("bf16", to_bf16, from_bf16),
        ("f16", to_f16, lambda b: b.view(np.float16).astype(np.float32)),
    ):
        y = encode(packed).view(np.uint32).reshape(-1)
        yield Case(f"pack_{name}", f"pack_{name}", 0 * y, y, [pairs])
        small = np.clip(pairs, -1000, 1000)
        words = encode(small).view(np.uint32).reshape(-1)
        low, high = decode(encode(small)).T
        with np.errstate(over="ignore"):
            total = low + 2 * high
        yield Case(f"unpack_{name}", f"unpack_{name}", 0 * total, total, [words])
        terms = encode(g.normal(0, 3, (128, 2, 2)).astype(np.float32))
        a, b = decode(terms).swapaxes(0, 1)
        sums = encode(a + b).view(np.uint32).reshape(-1)
        operands = terms.view(np.uint32).reshape(-1, 2)
        yield Case(f"add_{name}", f"add_{name}", 0 * sums, sums, [operands])
