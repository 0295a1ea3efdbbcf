"""Random calls: right, or refused by name; never a crash, and never an error of another kind."""

from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.check import raw_errors, same_bits
from tests.samples import SAMPLES, WITH_GRADIENT, others
from warpformer import _C, InputError, ops

FLOATS = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
SIZES = st.integers(0, 20)
settings.register_profile("suite", max_examples=50, deadline=None, database=None, derandomize=True)
settings.load_profile("suite")


@st.composite
def tensors(draw, shape, dtype):
    """Random numbers in a random layout: permuted dimensions, steps, an offset, stride 0."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from((1, 1, 2, 3)), min_size=len(shape), max_size=len(shape)))
    stored = torch.randn([shape[d] * steps[d] for d in order], generator=generator).to(dtype)
    t = stored.permute([order.index(d) for d in range(len(shape))])
    t = t[tuple(slice(None, None, step) for step in steps)]
    for d in range(len(shape)):
        if shape[d] and draw(st.integers(0, 9)) == 0:
            t = t.narrow(d, 0, 1).expand(t.shape)
    return t


def close(out, expected, scale=0.0):
    """Within a few roundings of the result, or of terms as large as `scale` that it is the sum of."""
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, expected.to(out.dtype), rtol=4 * eps, atol=1e-5 + eps * scale)


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4), dtype=FLOATS)
def test_softmax(data, shape, dtype):
    x = data.draw(tensors(shape, dtype))
    mask = data.draw(tensors([data.draw(st.sampled_from((1, n))) for n in shape], dtype))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    close(ops.softmax(x, dim, mask=mask, scale=0.7), F.softmax(0.7 * x.double() + mask.double(), dim))


@given(data=st.data(), shape=st.lists(st.integers(1, 20), min_size=1, max_size=4), dtype=FLOATS)
def test_cross_entropy(data, shape, dtype):
    x, classes = data.draw(tensors(shape, dtype)), shape[min(1, len(shape) - 1)]
    target = torch.randint(-1, classes, shape[:1] + shape[2:] if len(shape) > 1 else [])
    options = {"ignore_index": -1, "reduction": "none", "label_smoothing": 0.2}
    close(ops.cross_entropy(x, target, **options), F.cross_entropy(x.double(), target, **options))


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4), dtype=FLOATS)
def test_activation(data, shape, dtype):
    x, up, bias = (data.draw(tensors(size, dtype)) for size in (shape, shape, shape[-1:]))
    close(ops.activation(x, up=up, bias=bias), F.gelu(x.double() + bias.double()) * up.double())


@given(
    data=st.data(), shape=st.lists(SIZES, min_size=2, max_size=4), rotated=st.integers(0, 10), dtype=FLOATS
)
def test_rope(data, shape, rotated, dtype):
    x = data.draw(tensors([*shape, 20], dtype))
    positions = torch.randint(30, shape[:-1])
    inv_freq = torch.rand(rotated, dtype=torch.float64)
    out = ops.rope(x, *ops.rope_tables(inv_freq, 30), positions=positions, interleaved=True)
    turned = torch.view_as_complex(x.double()[..., : 2 * rotated].unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones(()).double(), positions[..., None, None] * inv_freq)
    expected = torch.cat([torch.view_as_real(turned).flatten(-2), x[..., 2 * rotated :].double()], -1)
    close(out, expected)


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4), p=st.floats(0, 1), dtype=FLOATS)
def test_dropout(data, shape, p, dtype):
    x, residual = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    out = ops.dropout(x, p, residual=residual, seed=3)
    kept = ops.dropout(torch.ones(shape), p, seed=3) > 0
    close(out, residual.double() + torch.where(kept, x.double() / (1 - p), 0))


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4), dtype=FLOATS)
def test_layer_norm(data, shape, dtype):
    dims = data.draw(st.integers(1, len(shape)))
    x, residual = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    weight, bias = (data.draw(tensors(shape[-dims:], dtype)) for _ in range(2))
    args = (shape[-dims:], weight, bias)
    out = ops.layer_norm(x, *args, eps=0.1, residual=residual)
    wide = (t.double() if isinstance(t, torch.Tensor) else t for t in args)
    close(out, F.layer_norm((x + residual).double(), *wide, eps=0.1))


@given(data=st.data(), shape=st.lists(SIZES, min_size=1, max_size=4), dtype=FLOATS)
def test_rms_norm(data, shape, dtype):
    dims = data.draw(st.integers(1, len(shape)))
    x, residual = data.draw(tensors(shape, dtype)), data.draw(tensors(shape, dtype))
    weight = data.draw(tensors(shape[-dims:], dtype))
    out, z = ops.rms_norm(x, shape[-dims:], weight, 0.1, residual=residual, return_sum=True)
    assert same_bits(z, x + residual)
    close(out, F.rms_norm(z.double(), shape[-dims:], weight.double(), 0.1))


@given(data=st.data(), shape=st.lists(SIZES, max_size=3), n=SIZES, k=SIZES, dtype=FLOATS)
def test_linear(data, shape, n, k, dtype):
    x, weight = data.draw(tensors([*shape, k], dtype)), data.draw(tensors([n, k], dtype))
    bias, residual = data.draw(tensors([n], dtype)), data.draw(tensors([*shape, n], dtype))
    out = ops.linear(x, ops.pack_linear(weight), bias, activation="tanh", residual=residual)
    product = x.double() @ weight.double().mT + bias.double()
    close(out, torch.tanh(product) + residual.double())


@given(data=st.data(), sizes=st.lists(SIZES, min_size=6, max_size=6), dtype=FLOATS)
def test_attention(data, sizes, dtype):
    b, h, t, s, d, dv = sizes
    shapes = ([b, h, t, d], [b, h, s, d], [b, h, s, dv], [b, 1, t, s])
    q, k, v, mask = (data.draw(tensors(shape, dtype)) for shape in shapes)
    if h == 0:
        with pytest.raises(InputError):
            ops.scaled_dot_product_attention(q, k, v, mask)
        return
    scores = 0.2 * q.double() @ k.double().mT + mask.double()
    expected = torch.softmax(scores, -1) @ v.double()
    largest = max(v.double().abs().flatten().tolist(), default=0.0)  # weights are rounded to bfloat16, too
    close(ops.scaled_dot_product_attention(q, k, v, mask, scale=0.2), expected, largest)


def junk_tensor(shape, dtype, kind):
    shape = shape[:4] + [min(n, 1) for n in shape[4:]]  # of nine 5, they would be gigabytes
    t = torch.zeros(shape).to(dtype)
    return {
        "plain": t,
        "step": torch.zeros([2 * n for n in shape]).to(dtype)[(slice(None, None, 2),) * len(shape)],
        "meta": t.to("meta"),
        "numpy": np.zeros(shape, np.float64 if dtype == torch.bfloat16 else t.numpy().dtype),
        "reversed": np.zeros(shape, np.float32)[(slice(None, None, -1),) * len(shape)],
        "records": np.zeros(shape, [("a", "u1"), ("b", "f4")])["b"],
        "big endian": np.zeros(shape, ">f4"),
    }[kind]


JUNK = st.one_of(
    st.builds(
        junk_tensor,
        st.lists(st.integers(0, 5), max_size=9),
        st.sampled_from(
            (
                torch.float32,
                torch.bfloat16,
                torch.int32,
                torch.int64,
                torch.bool,
                torch.float64,
                torch.complex64,
            )
        ),
        st.sampled_from(("plain", "step", "meta", "numpy", "reversed", "records", "big endian")),
    ),
    st.none(),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=3),
    st.just([]),
    st.just([None]),
    st.just(object()),
)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)
def test_one_odd_argument(sample):
    assert raw_errors(sample(torch.float32)) == {}


@pytest.mark.parametrize("sample", WITH_GRADIENT, ids=lambda s: s.__name__)
def test_one_odd_argument_with_gradient(sample):
    """The call then goes through torch's dispatcher, which has errors of its own."""
    assert raw_errors(sample(torch.float32).leaves()[0]) == {}


@pytest.mark.parametrize("call", others(), ids=lambda call: call.op.__name__)
def test_one_odd_argument_of_others(call):
    assert raw_errors(call) == {}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)
@given(data=st.data())
def test_junk_in_a_call(sample, data):
    call = sample(torch.float32)
    args, kwargs = list(call.args), dict(call.kwargs)
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from([*range(len(args)), *kwargs]))
        (kwargs if isinstance(where, str) else args)[where] = data.draw(JUNK)
    with suppress(InputError, TypeError):
        assert isinstance(call.op(*args, **kwargs), torch.Tensor)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.__name__)
@given(data=st.data())
def test_junk_in_the_extension(sample, data):
    name, args, _ = sample(torch.float32).kernel()
    for _ in range(data.draw(st.integers(1, 2))):
        args[data.draw(st.integers(0, len(args) - 1))] = data.draw(JUNK)
    with suppress(InputError, TypeError):
        getattr(_C, name)(*args)
