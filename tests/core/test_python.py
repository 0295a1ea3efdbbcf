"""The caster: what the extension reads of a torch.Tensor and of a numpy.ndarray."""

import numpy as np
import pytest
import torch

from warpformer import _C, InputError


def softmax(x, out=None):
    out = np.full(x.shape, np.nan, np.float32) if out is None else out
    _C.softmax(x, None, out, -1, 1.0, False, 1)
    return out


def expected(x):
    return torch.softmax(torch.from_numpy(np.ascontiguousarray(x, np.float32)), -1).numpy()


ARRAY = np.random.default_rng(0).standard_normal((6, 8), np.float32)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[::-1, ::-1],
        lambda a: a[:, 1::3],
        lambda a: a.T,
        lambda a: a[:0],
        lambda a: a[:, :0],
        lambda a: np.broadcast_to(a[:1], a.shape),  # read-only
        lambda a: a.astype(np.float16),
    ],
)
def test_numpy_views(device, view):
    x = view(ARRAY)
    np.testing.assert_allclose(softmax(x), expected(x), rtol=1e-6)


def test_output_with_negative_strides(device):
    out = np.full((6, 8), np.nan, np.float32)
    softmax(ARRAY, out[::-1, ::-1])
    np.testing.assert_allclose(out[::-1, ::-1], expected(ARRAY), rtol=1e-6)


def test_output_between_other_elements(device):
    out = np.full((6, 16), 7, np.float32)
    softmax(ARRAY, out[:, ::2])
    np.testing.assert_allclose(out[:, ::2], expected(ARRAY), rtol=1e-6)
    assert (out[:, 1::2] == 7).all()


def test_torch_and_numpy_together(device):
    out = torch.full((6, 8), torch.nan)
    softmax(ARRAY, out)
    np.testing.assert_allclose(out.numpy(), expected(ARRAY), rtol=1e-6)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3)),
        np.zeros((2, 3), np.complex64),
        np.zeros((2, 3), ">f4"),
        np.zeros((2, 3), [("a", "u1"), ("b", "f4")])["b"],  # a stride that is no number of elements
        np.zeros((2, 3), object),
        np.zeros((2, 3), "S4"),
    ],
    ids=lambda a: str(a.dtype),
)
def test_numpy_dtypes(array):
    with pytest.raises(InputError, match=r"^softmax: .* x = unsupported dtype\[2,3\] cpu"):
        softmax(array)


@pytest.mark.parametrize("value", [None, 1.0, "text", [[1.0]], memoryview(b"1234")])
def test_not_an_array(value):
    with pytest.raises(TypeError):
        softmax(value, np.zeros((2, 3), np.float32))


def test_too_many_dimensions():
    eight, nine = np.zeros((1,) * 7 + (2,), np.float32), np.zeros((1,) * 8 + (2,), np.float32)
    assert (softmax(eight) == 0.5).all()
    for array in (nine, torch.from_numpy(nine)):
        with pytest.raises(InputError, match="more than 8 dimensions"):
            softmax(array, eight)
