"""Cases of bulk.cu: bulk copies, boxes of tensors of 1 to 5 dimensions, swizzles, additions."""

from collections.abc import Iterator
from itertools import product

import numpy as np

from tests.conformance.case import Case, to_bf16, to_f16

NO_SWIZZLE = 16
TYPES = {"u8": np.uint8, "u16": np.uint16, "f32": np.float32}


def cases() -> Iterator[Case]:
    yield from _bytes()
    for kind, dtype in TYPES.items():
        size = np.dtype(dtype).itemsize
        yield from _boxes(kind, dtype, 64 // size)
        for span in (32, 64, 128):
            yield from _swizzles(kind, dtype, span)
    yield from _additions()


def _bytes() -> Iterator[Case]:
    g = np.random.default_rng(8)
    x = g.integers(0, 256, 2048).astype(np.uint8)
    yield Case("bulk_copy", "bulk_copy", 0 * x, np.roll(x, 1024), [x], needs="sm_90")
    encodings = {
        "f32": lambda v: v.astype(np.float32),
        "i32": lambda v: v.astype(np.int32),
        "f16": to_f16,
        "bf16": to_bf16,
    }
    for kind, encode in encodings.items():
        values = g.integers(-20, 21, 512).astype(np.float64)
        y = np.roll(values, 256)
        per_16 = 16 // encode(values).itemsize
        expected = 2 * y  # stored, then added once more; and the first 16 bytes go to the second as well
        expected[per_16 : 2 * per_16] += y[:per_16]
        x = encode(values)
        kernel = f"bulk_add_{kind}"
        yield Case(kernel, kernel, np.zeros_like(x), encode(expected), [x], needs="sm_90")


def codes(shape: tuple[int, ...], dtype) -> np.ndarray:
    """Elements that say where they are: no two neighbours alike, none zero."""
    index = np.arange(int(np.prod(shape)))
    return ((index % 251) + 1 if dtype == np.uint8 else index % 65521 + 1).astype(dtype).reshape(shape)


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """The 16-byte chunk's number in its span, XORed with the number of the 128-byte line."""
    chunks = span // 16
    chunk, line = address // 16 % chunks, address // 128 % chunks
    return address + 16 * ((chunk ^ line) - chunk)


class Box:
    """A box of a tensor (numpy's order of dimensions, outermost first), at `at`, and its image."""

    def __init__(self, tensor, box, at, span=NO_SWIZZLE, offset=0, sizes=None):
        self.tensor, self.box, self.at, self.span, self.offset = tensor, box, at, span, offset
        self.sizes = sizes or tensor.shape  # less than the shape: rows with something behind them
        size = tensor.itemsize
        self.bytes = int(np.prod(box)) * size
        self.image_bytes = -(-(offset + self.bytes) // 1024) * 1024
        # Byte addresses of the box's elements in the image, and where they lie in the tensor.
        plain = offset + size * np.arange(int(np.prod(box))).reshape(box)
        self.addresses = swizzled(plain, span)
        grid = np.meshgrid(*[a + np.arange(n) for a, n in zip(at, box, strict=True)], indexing="ij")
        limits = zip(grid, self.sizes, strict=True)
        self.inside = np.logical_and.reduce([(x >= 0) & (x < n) for x, n in limits])
        self.places = tuple(x[self.inside] for x in grid)

    def numbers(self) -> list[int]:
        def five(values, filler):
            inner_first = list(values)[::-1]
            return inner_first + [filler] * (5 - len(inner_first))

        strides = [s // self.tensor.itemsize for s in self.tensor.strides]
        rows = (self.sizes, 1), (strides, 0), (self.box, 1), (self.at, 0)
        tail = [self.span, self.offset, self.image_bytes]
        return [len(self.box), *[n for values, filler in rows for n in five(values, filler)], *tail]

    def image(self, values: np.ndarray) -> np.ndarray:
        """The image with `values` of the box's shape in it, zeros elsewhere."""
        image = np.zeros(self.image_bytes // values.itemsize, values.dtype)
        image[self.addresses // values.itemsize] = values
        return image.view(np.uint8)

    def loaded(self) -> np.ndarray:
        values = np.zeros(self.box, self.tensor.dtype)
        values[self.inside] = self.tensor[self.places]
        return self.image(values)

    def stored(self, values: np.ndarray) -> np.ndarray:
        result = self.tensor.copy()
        result[self.places] = values[self.inside]
        return result


def _load_and_store(name: str, kind: str, box: Box) -> Iterator[Case]:
    expected = box.loaded()
    yield Case(
        f"tensor_load_{kind}_{name}",
        f"tensor_load_{kind}",
        0 * expected,
        expected,
        [box.tensor],
        box.numbers(),
        needs="sm_90",
    )
    values = codes(box.box, box.tensor.dtype)[..., ::-1]
    yield Case(
        f"tensor_store_{kind}_{name}",
        f"tensor_store_{kind}",
        box.tensor,
        box.stored(values),
        [box.image(values)],
        box.numbers(),
        needs="sm_90",
    )


def _boxes(kind: str, dtype, w: int) -> Iterator[Case]:
    """Without a swizzle: every rank, inside the tensor, across its edges and outside."""
    shapes = {
        1: ((4 * w,), (2 * w,)),
        2: ((12, 2 * w), (5, w)),
        3: ((5, 6, 2 * w), (2, 3, w)),
        4: ((3, 4, 5, 2 * w), (2, 2, 3, w)),
        5: ((3, 2, 3, 4, 2 * w), (2, 1, 2, 3, w)),
    }
    for rank, (shape, box) in shapes.items():
        tensor = codes(shape, dtype)
        positions = {
            "inside": [(n - b) // 2 for n, b in zip(shape, box, strict=True)],
            "start": [-((b + 1) // 2) for b in box],
            "end": [n - b // 2 for n, b in zip(shape, box, strict=True)],
            "outside": [*[0] * (rank - 1), shape[-1] + 3],
        }
        if rank > 1:
            positions["above"] = [-box[0], *[1] * (rank - 1)]
        for position, at in positions.items():
            yield from _load_and_store(f"{rank}d_{position}", kind, Box(tensor, box, at))
    # The tensor's rows are longer than the tensor is wide, and one is cut within 16 bytes.
    tensor = codes((7, 2 * w), dtype)
    yield from _load_and_store("pitch", kind, Box(tensor, (4, w), (5, w), sizes=(7, 2 * w - 3)))


def _swizzles(kind: str, dtype, span: int) -> Iterator[Case]:
    w = span // np.dtype(dtype).itemsize
    tensor = codes((21, 2 * w), dtype)
    for (position, at), offset in product(
        {"inside": (3, w // 2), "edges": (-2, w + w // 4), "last": (16, -w // 4)}.items(), (0, 128, 640)
    ):
        name = f"swizzle{span}_{position}_{offset}"
        yield from _load_and_store(name, kind, Box(tensor, (10, w), at, span, offset))
    tensor = codes((3, 9, 2 * w), dtype)
    yield from _load_and_store(f"swizzle{span}_3d", kind, Box(tensor, (2, 8, w), (1, 2, 3), span))


def _additions() -> Iterator[Case]:
    g = np.random.default_rng(9)
    encodings = {
        "f32": lambda v: v.astype(np.float32),
        "i32": lambda v: v.astype(np.int32),
        "f16": to_f16,
        "bf16": to_bf16,
    }
    for kind, encode in encodings.items():
        size = encode(np.zeros(1)).itemsize
        for span in (NO_SWIZZLE, 128):
            w = 128 // size
            before = g.integers(-50, 51, (9, 2 * w)).astype(np.float64)
            values = g.integers(-50, 51, (6, w)).astype(np.float64)
            box = Box(encode(before), (6, w), (5, w + w // 2), span)
            after = before.copy()
            after[box.places] += values[box.inside]
            yield Case(
                f"tensor_add_{kind}_{span}",
                f"tensor_add_{kind}",
                box.tensor,
                encode(after),
                [box.image(encode(values))],
                box.numbers(),
                needs="sm_90",
            )
