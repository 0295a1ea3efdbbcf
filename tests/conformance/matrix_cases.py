"""Cases of matrix.cu: fragments and mma.

The layouts are written here once more from the PTX ISA, as index arrays [register][lane][element], for the
emulator's own (tests/emulator/layouts.h) to be checked against.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.conformance.case import Case, from_bf16, to_bf16, to_f16, to_tf32

LANE = np.arange(32)
SPACE = 4096


@dataclass
class Operand:
    """An operand type of mma and wgmma: how floats become its bits, and what those bits are worth."""

    name: str
    bits: type
    largest: int  # integers up to this are exact

    @property
    def size(self) -> int:
        return np.dtype(self.bits).itemsize

    @property
    def depth(self) -> int:
        """K of one wgmma; mma of 1- and 2-byte types has the same, that of tf32 too."""
        return 32 // self.size

    @property
    def result(self) -> type:
        return np.int32 if self.name == "s8" else np.float32

    def encode(self, x: np.ndarray) -> np.ndarray:
        if self.name == "s8":
            return x.astype(np.int8)
        return {"bf16": to_bf16, "f16": to_f16, "tf32": to_tf32}[self.name](x)

    def decode(self, bits: np.ndarray) -> np.ndarray:
        if self.name == "s8":
            return bits.astype(np.float64)
        if self.name == "tf32":
            return bits.view(np.float32).astype(np.float64)
        wide = from_bf16(bits) if self.name == "bf16" else bits.view(np.float16)
        return wide.astype(np.float64)

    def codes(self, count: int) -> np.ndarray:
        """`count` integers, different as far as the type allows."""
        if self.name == "s8":
            return (np.arange(count) * 37) % 251 - 125.0
        return np.arange(1.0, count + 1)

    def small(self, g, shape) -> np.ndarray:
        """Integers whose products have exact sums."""
        limit = 100 if self.name == "s8" else 4
        return g.integers(-limit, limit + 1, shape).astype(np.float64)


OPERANDS = (
    Operand("bf16", np.uint16, 256),
    Operand("f16", np.uint16, 2048),
    Operand("tf32", np.uint32, 2048),
    Operand("s8", np.int8, 127),
)


def a_fragment(p: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of A's element [lane][register][i], p elements a register: 4 registers."""
    lane, r, i = np.meshgrid(LANE, np.arange(4), np.arange(p), indexing="ij")
    return lane // 4 + np.where(r & 1, 8, 0), p * (lane % 4) + i + np.where(r & 2, 4 * p, 0)


def b_fragment(p: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (k) and column (n) of B's element [lane][register][i]: 2 registers."""
    lane, r, i = np.meshgrid(LANE, np.arange(2), np.arange(p), indexing="ij")
    return p * (lane % 4) + i + 4 * p * r, lane // 4


def c_fragment() -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the accumulator [lane][i]."""
    lane, i = np.meshgrid(LANE, np.arange(4), indexing="ij")
    return lane // 4 + np.where(i & 2, 8, 0), 2 * (lane % 4) + (i & 1)


def registers(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The fragment of (a stack of) matrices as 32-bit words."""
    elements = np.ascontiguousarray(matrix[..., rows, columns])
    return elements.view(np.uint32)[..., 0]


def cases() -> Iterator[Case]:
    yield from _fragments()
    yield from _transposed()
    for operand in OPERANDS:
        yield from _products(operand)


def _fragments() -> Iterator[Case]:
    space = np.arange(SPACE // 2, dtype=np.uint16)  # every element says where it is
    g = np.random.default_rng(6)
    orders = {"rows": np.arange(32) * 16, "scattered": g.permutation(SPACE // 16)[:32] * 16}
    for order, rows in orders.items():
        matrices = space.reshape(-1, 8)[rows // 16].reshape(4, 8, 8)  # [matrix][row][column]
        for transposed in (False, True):
            # A lane's register of a matrix: two neighbours in a row of it, or of its transpose.
            seen = matrices.transpose(0, 2, 1) if transposed else matrices
            words = np.ascontiguousarray(seen).reshape(4, 32, 2).view(np.uint32)[..., 0]
            kind = "_transposed" if transposed else ""
            inputs = [space.view(np.uint8), rows.astype(np.int32)]
            for count in (1, 2, 4):
                # Beyond the lanes whose addresses count, they may be anything.
                valid = inputs[1].copy()
                valid[8 * count :] = 0
                expected = words[:count]
                yield Case(
                    f"ldmatrix{kind}_{count}_{order}",
                    f"ldmatrix{kind}_{count}",
                    np.zeros_like(expected),
                    expected,
                    [inputs[0], valid],
                )
                stored = np.zeros(SPACE // 2, np.uint16)
                stored.reshape(-1, 8)[rows[: 8 * count] // 16] = matrices[:count].reshape(-1, 8)
                stored = stored.view(np.uint8)
                yield Case(
                    f"stmatrix{kind}_{count}_{order}",
                    f"stmatrix{kind}_{count}",
                    np.zeros_like(stored),
                    stored,
                    [np.ascontiguousarray(words[:count]), valid],
                    needs="sm_90",
                )
            yield Case(
                f"ldmatrix{kind}_pair_{order}", f"ldmatrix{kind}_pair", np.zeros_like(words), words, inputs
            )


def _transposed() -> Iterator[Case]:
    matrices = np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8)  # every element says where it is

    def words(m):
        return np.ascontiguousarray(m).reshape(3, 32, 2).view(np.uint32)[..., 0]

    expected = words(matrices.transpose(0, 2, 1))
    yield Case(
        "movmatrix_transposed",
        "movmatrix_transposed",
        np.zeros_like(expected),
        expected,
        [words(matrices)],
    )


def _products(t: Operand) -> Iterator[Case]:
    k, g = t.depth, np.random.default_rng(7)

    def case(name, a, b, c, bound=None):
        """Of stacks a [block][16][k], b [block][k][8], c [block][16][8]."""
        p = 4 // t.size
        a, b = t.encode(a), t.encode(b)
        d = t.decode(a) @ t.decode(b) + c
        rows, columns = c_fragment()
        if bound is not None:
            magnitude = np.abs(t.decode(a)) @ np.abs(t.decode(b)) + np.abs(c)
            bound = k * 2.0**-22 * magnitude[..., rows, columns]
        return Case(
            f"mma_{t.name}_{name}",
            f"mma_{t.name}",
            np.ascontiguousarray(c[..., rows, columns]).astype(t.result),
            np.ascontiguousarray(d[..., rows, columns]).astype(t.result),
            [registers(a, *a_fragment(p)), registers(b, *b_fragment(p))],
            bound=bound,
        )

    # One element of A at a time against a B whose elements say where they are, and the other way round.
    one_a = np.eye(16 * k).reshape(-1, 16, k)
    codes = np.broadcast_to(t.codes(8 * k).reshape(k, 8), (16 * k, k, 8))
    yield case("one_hot_a", one_a, codes, np.zeros((16 * k, 16, 8)))
    one_b = np.eye(8 * k).reshape(-1, k, 8)
    codes = np.broadcast_to(t.codes(16 * k).reshape(16, k), (8 * k, 16, k))
    yield case("one_hot_b", codes, one_b, np.zeros((8 * k, 16, 8)))
    c = g.integers(-1000, 1000, (4, 16, 8)).astype(np.float64)
    yield case("integers", t.small(g, (4, 16, k)), t.small(g, (4, k, 8)), c)
    if t.name == "s8":
        extreme = np.full((1, 16, k), -128.0), np.full((1, k, 8), -128.0), np.zeros((1, 16, 8))
        yield case("extreme", *extreme)
    else:
        c = g.normal(0, 1, (2, 16, 8)).astype(np.float32).astype(np.float64)
        yield case("random", g.normal(0, 1, (2, 16, k)), g.normal(0, 1, (2, k, 8)), c, bound=True)
