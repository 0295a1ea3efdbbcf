"""Cases of the wgmma_*.cu files: every type, width and layout of the operands.

An operand's layout is written here from the canonical layouts in units of 16-byte chunks, not as in the
emulator (tests/emulator/layouts.h).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.conformance.bulk_cases import swizzled
from tests.conformance.case import Case
from tests.conformance.matrix_cases import OPERANDS, Operand, a_fragment, registers

WIDTHS = {"s8": (8, 16, 24, 32, *range(48, 257, 16))}
EVERY_WIDTH = tuple(range(8, 257, 8))
SOME_WIDTHS = (8, 64, 104, 256)
SPANS = (16, 32, 64, 128)


@dataclass
class Layout:
    """How an operand of `extent` rows (of A) or columns (of B) and `depth` bytes of K lies in memory.

    Chunks of 16 bytes. K-major: chunk (i, c) of row i and 16 bytes c of K. MN-major: chunk (k, c) of line k
    and 16 bytes c along M or N. An instruction takes 32 bytes (K-major) or 32 / size lines (MN-major) of K.
    """

    operand: Operand
    extent: int
    span: int
    mn_major: bool = False
    gap: int = 0  # bytes left free between units, so that both offsets matter
    base: int = 0  # where the pattern of the swizzle starts, in 128-byte lines past a multiple of 8

    @property
    def lines_and_chunks(self) -> tuple[int, int]:
        """For the K that fits the layout best: one span, or two instructions."""
        size = self.operand.size
        if self.mn_major:
            return 2 * self.operand.depth, self.extent * size // 16
        return self.extent, max(self.span, 64) // 16 if self.span in (16, 128) else self.span // 16

    @property
    def depth(self) -> int:
        """K in elements."""
        lines, chunks = self.lines_and_chunks
        return lines if self.mn_major else chunks * 16 // self.operand.size

    @property
    def steps(self) -> int:
        return self.depth // self.operand.depth

    @property
    def unit(self) -> int:
        """Bytes of eight lines of a span, and the gap."""
        return 8 * self.span + self.gap

    def strides(self) -> tuple[int, int, int]:
        """From unit to unit across and along the direction of neighbours; from instruction to instruction."""
        lines, chunks = self.lines_and_chunks
        units_across, spans = lines // 8, chunks * 16 // self.span
        if self.mn_major:  # spans side by side first
            along, across = self.unit, self.unit * max(spans, 1)
            return across, along, across * self.operand.depth // 8
        across, along = self.unit, self.unit * units_across
        return across, along, 2 * along if self.span == 16 else 32

    def offsets(self) -> tuple[int, int]:
        """Leading and stride byte offsets of the descriptor."""
        across, along, _ = self.strides()
        if self.span == 16:
            return (across, along) if self.mn_major else (along, across)
        return (along, across) if self.mn_major else (16, across)

    def addresses(self) -> np.ndarray:
        """Of every chunk, [line][chunk], from the operand's start."""
        lines, chunks = self.lines_and_chunks
        across, along, _ = self.strides()
        line, chunk = np.meshgrid(np.arange(lines), np.arange(chunks), indexing="ij")
        per_span = self.span // 16
        along_line = chunk // per_span * along + chunk % per_span * 16
        return swizzled(line // 8 * across + line % 8 * self.span + along_line, self.span)

    def bytes(self) -> int:
        return -(-(int(self.addresses().max()) + 16 + 128 * self.base) // 1024) * 1024

    def image(self, bits: np.ndarray) -> np.ndarray:
        """(A stack of) matrices [extent][depth] as bytes from the operand's start, less its base."""
        rows = np.swapaxes(bits, -1, -2) if self.mn_major else bits
        lines, chunks = self.lines_and_chunks
        chunked = np.ascontiguousarray(rows).view(np.uint8).reshape(*bits.shape[:-2], lines, chunks, 16)
        image = np.zeros((*bits.shape[:-2], self.bytes() // 16, 16), np.uint8)
        image[..., (self.addresses() + 128 * self.base) // 16, :] = chunked
        return image.reshape(*bits.shape[:-2], -1)

    def numbers(self, start: int) -> list[int]:
        return [start + 128 * self.base, *self.offsets(), self.base, self.span]


def cases() -> Iterator[Case]:
    g = np.random.default_rng(10)
    for t in OPERANDS:
        for n in WIDTHS.get(t.name, EVERY_WIDTH):
            for a_in_registers in (False, True):
                yield _integers(g, t, n, Layout(t, 64, 128), Layout(t, n, 128), a_in_registers)
        yield from _layouts(g, t)
        yield from _one_hot(t)
        if t.name != "s8":
            yield _random(g, t)
    odd = np.arange(1, 768, 2, dtype=np.int32)
    yield Case("set_registers", "wgmma_set_registers", 0 * odd, odd, needs="sm_90a")


def _layouts(g, t: Operand) -> Iterator[Case]:
    """Every swizzle and gap, K-major and, of the 2-byte types, MN-major."""
    for span in SPANS:
        for gap in (0, 1024) if span < 128 else (1024,):  # every width has had the plainest
            a = Layout(t, 64, span, gap=gap)
            for a_in_registers in (False, True):
                yield _integers(g, t, 64, a, Layout(t, 64, span, gap=gap), a_in_registers)
    yield _integers(g, t, 64, Layout(t, 64, 128), Layout(t, 64, 32), False)
    for base in (1, 5) if t.name == "bf16" else ():
        layout = Layout(t, 64, 128, base=base)
        yield _integers(g, t, 64, layout, layout, False)
    if t.size != 2:
        return
    for n in SOME_WIDTHS:
        for span in SPANS:
            if n * t.size % span:
                continue  # N is not a whole number of spans
            for gap in (0, 1024):
                a, a_mn = Layout(t, 64, 128), Layout(t, 64, span, True, gap)
                b, b_mn = Layout(t, n, 128), Layout(t, n, span, True, gap)
                yield _integers(g, t, n, a, b_mn, False)
                yield _integers(g, t, n, a, b_mn, True)
                yield _integers(g, t, n, a_mn, b, False)
                yield _integers(g, t, n, a_mn, b_mn, False)


def _case(name, t, n, a_layout, b_layout, a_in_registers, a, b, d, accumulate, bound=None) -> Case:
    """Of stacks a [block][64][K], b [block][N][K], d [block][64][n] for the K both layouts hold."""
    depth = min(a_layout.depth, b_layout.depth, t.depth if a_in_registers else 1 << 20)
    steps = depth // t.depth

    def fill(x, layout):
        """Numbers where K goes on beyond what the instructions read."""
        bits = t.encode(x)
        whole = np.ones((*x.shape[:-1], layout.depth), bits.dtype)
        whole[..., :depth] = bits[..., :depth]
        return whole

    a_bits, b_bits = fill(a, a_layout), fill(b, b_layout)
    left, right = (t.decode(x[..., :depth]) for x in (a_bits, b_bits))
    result = left @ np.swapaxes(right, -1, -2) + (d if accumulate else 0)
    thread, i = np.meshgrid(np.arange(128), np.arange(n // 2), indexing="ij")
    rows = 16 * (thread // 32) + thread % 32 // 4 + np.where(i & 2, 8, 0)
    columns = 8 * (i // 4) + 2 * (thread % 4) + (i & 1)
    if bound is not None:
        magnitude = np.abs(left) @ np.swapaxes(np.abs(right), -1, -2) + np.abs(d)
        bound = (depth * 2.0**-22 * magnitude)[..., rows, columns]
    row, column = a_fragment(4 // t.size)
    warps = [registers(a_bits[..., : t.depth], row + 16 * warp, column) for warp in range(4)]
    a_image, b_image = a_layout.image(a_bits), b_layout.image(b_bits)
    images = np.concatenate([a_image, b_image], -1)
    a_step, b_step = a_layout.strides()[2], b_layout.strides()[2]
    majors = ["mn" if layout.mn_major else "k" for layout in (a_layout, b_layout)]
    kind = "_registers" + "_mn" * b_layout.mn_major if a_in_registers else "_" + "_".join(majors)
    kernel = f"wgmma_{t.name}" + ("" if kind == "_k_k" else kind)
    numbers = [n, images.shape[-1], *a_layout.numbers(0), *b_layout.numbers(a_image.shape[-1])]
    numbers += [accumulate, steps, a_step, b_step]
    start = np.ascontiguousarray(d[..., rows, columns]).astype(t.result)
    expected = np.ascontiguousarray(result[..., rows, columns]).astype(t.result)
    inputs = [images, np.concatenate(warps, -2)]
    return Case(name, kernel, start, expected, inputs, numbers, bound, needs="sm_90a")


def _name(t, n, a, b, a_in_registers) -> str:
    def part(layout):
        tail = f"gap{layout.gap}" * bool(layout.gap) + f"base{layout.base}" * bool(layout.base)
        return ("mn" if layout.mn_major else "k") + str(layout.span) + tail

    return f"wgmma_{t.name}_{n}_{'registers' if a_in_registers else part(a)}_{part(b)}"


def _integers(g, t, n, a_layout, b_layout, a_in_registers) -> Case:
    depth = max(a_layout.depth, b_layout.depth)
    a, b = t.small(g, (1, 64, depth)), t.small(g, (1, n, depth))
    d = g.integers(-1000, 1000, (1, 64, n)).astype(np.float64)
    accumulate = bool(g.integers(2))
    name = _name(t, n, a_layout, b_layout, a_in_registers)
    return _case(name, t, n, a_layout, b_layout, a_in_registers, a, b, d, accumulate)


def _one_hot(t: Operand) -> Iterator[Case]:
    """One element of A, or of B, at a time against an operand whose elements say where they are."""
    k, n = t.depth, 8
    a_layout, b_layout = Layout(t, 64, 32), Layout(t, n, 32)
    for a_in_registers in (False, True):
        count = 64 * k
        one = np.eye(count).reshape(count, 64, k)
        codes = np.broadcast_to(t.codes(n * k).reshape(n, k), (count, n, k))
        where = "registers" if a_in_registers else "shared"
        name = f"wgmma_{t.name}_one_hot_a_{where}"
        zeros = np.zeros((count, 64, n))
        yield _case(name, t, n, a_layout, b_layout, a_in_registers, one, codes, zeros, False)
    count = n * k
    one = np.eye(count).reshape(count, n, k)
    codes = t.codes(64 * k) % (t.largest + 1 if t.name != "s8" else 128)
    codes = np.broadcast_to(codes.reshape(64, k), (count, 64, k))
    zeros = np.zeros((count, 64, n))
    yield _case(f"wgmma_{t.name}_one_hot_b", t, n, a_layout, b_layout, False, codes, one, zeros, False)


def _random(g, t: Operand) -> Case:
    n, a_layout, b_layout = 16, Layout(t, 64, 128), Layout(t, 16, 128)
    a, b = g.normal(0, 1, (1, 64, a_layout.depth)), g.normal(0, 1, (1, n, b_layout.depth))
    d = g.normal(0, 1, (1, 64, n)).astype(np.float32).astype(np.float64)
    return _case(f"wgmma_{t.name}_random", t, n, a_layout, b_layout, False, a, b, d, True, bound=True)
