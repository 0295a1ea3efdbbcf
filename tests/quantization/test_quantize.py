import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import warpformer as wf
from tests.check import relative_error, same_bits
from warpformer import ops
from warpformer.ops._quantized import FORMATS, NF4, pack_nibbles, unpack_nibbles
from warpformer.quantization import dequantize, quantize
from warpformer.quantization.quantize import quantize_packed

ALL = [
    ("int8", False),
    ("int8_dynamic", False),
    ("int4", False),
    ("int4", True),
    ("int4_dynamic", False),
    ("int4_dynamic", True),
    ("nf4", False),
]

# Percent on N(0, 1), K = 4096: group size -> int8, int4, int4 with zero points, int4 clipped, nf4.
TABLE = {
    32: (0.535, 8.60, 8.07, 8.63, 8.73),
    64: (0.594, 9.50, 9.10, 9.48, 9.19),
    128: (0.647, 10.32, 10.06, 10.10, 9.56),
    4096: (0.868, 13.79, 14.01, 10.91, 11.00),
}
COLUMNS = [
    ("int8", {}),
    ("int4", {}),
    ("int4", {"zero_points": True}),
    ("int4", {"clip": "mse"}),
    ("nf4", {}),
]


@pytest.mark.parametrize("group_size", TABLE)
@pytest.mark.parametrize(("column", "format", "options"), [(i, *c) for i, c in enumerate(COLUMNS)])
def test_error_on_normal_weights(group_size, column, format, options):
    weight = torch.randn(128, 4096)
    error = relative_error(dequantize(quantize(weight, format, group_size, **options)), weight)
    assert error == pytest.approx(TABLE[group_size][column] / 100, rel=0.05)


def grouped(format, size):
    """`size` where the format has groups."""
    return -1 if format == "int8_dynamic" else size


def levels(quantized):
    """All numbers that each weight could have become: [N, K, levels]."""
    scales = quantized.scales.float().repeat_interleave(max(1, quantized.group_size), dim=1)
    scales = scales[:, : quantized.in_features, None]
    if quantized.format == "nf4":
        return scales * torch.tensor(NF4)
    if quantized.format.startswith("int8"):
        return scales * torch.arange(-127, 128)
    zeros = torch.full_like(quantized.scales, 8) if quantized.zeros is None else quantized.zeros.float()
    zeros = zeros.repeat_interleave(quantized.group_size, dim=1)[:, : quantized.in_features, None]
    return scales * (torch.arange(16) - zeros)


@pytest.mark.parametrize("clip", [None, "mse"])
@pytest.mark.parametrize(("format", "zero_points"), ALL)
def test_every_weight_becomes_the_nearest_level(format, zero_points, clip):
    weight = torch.randn(20, 200) ** 3  # heavy tails
    quantized = quantize(weight, format, grouped(format, 32), zero_points=zero_points, clip=clip)
    error = (dequantize(quantized) - weight).abs()
    least = (levels(quantized) - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close(error, least, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("format", "zero_points"), ALL)
@pytest.mark.parametrize("magnitude", [1e-40, 1e-37, 1.0, 3e38])
def test_error_bound_on_the_stored_scales(format, zero_points, magnitude):
    weight = torch.rand(50, 96).mul(2).sub(1).mul(magnitude)
    quantized = quantize(weight, format, grouped(format, 32), zero_points=zero_points)
    assert quantized.scales.isfinite().all()
    scales = quantized.scales.double().abs().repeat_interleave(quantized.group_size, 1)
    # nf4's widest step is 0.3 of its scale; symmetric int4 has no +8; scales are rounded by up to 1 / 256.
    symmetric = format.startswith("int4") and not zero_points
    bound = 1.04 if symmetric else 0.56 if zero_points else 0.16 if format == "nf4" else 0.5
    error = (dequantize(quantized).double() - weight.double()).abs() / scales
    assert error.max() <= bound * 1.00001
    if symmetric:
        inner = (weight / quantized.scales.float().repeat_interleave(32, 1)) <= 7.5
        assert error[inner].max() <= 0.500005


def test_scales():
    weight = torch.randn(30, 128)
    assert quantize(weight, "int8").group_size == 128
    lo, hi = weight.aminmax(dim=1, keepdim=True)
    largest = torch.where(hi > -lo, hi, lo)
    for format, expected in (("int8", largest.abs() / 127), ("int4", largest / -8), ("nf4", largest.abs())):
        assert same_bits(quantize(weight, format).scales, expected.bfloat16())
    assert (quantize(weight, "int4").scales < 0).any()
    torch.testing.assert_close(
        quantize(weight, "int4", zero_points=True).scales, ((hi - lo) / 15).bfloat16(), rtol=0.01, atol=0
    )


def test_codes_by_hand():
    quantized = quantize(torch.tensor([[8.0, -7, 0, 1, 2.4, 2.6, -7.9]]), "int4", 32)
    assert quantized.scales.tolist() == [[-1.0]]
    assert unpack_nibbles(quantized.values, 7).tolist() == [[0, 15, 8, 7, 6, 5, 15]]
    assert quantized.values.tolist() == [[0 + 16 * 15, 8 + 16 * 7, 6 + 16 * 5, 15]]
    asymmetric = quantize(torch.tensor([[0.0, 15, 7.4], [-5, 10, 3]]), "int4", 32, zero_points=True)
    assert (asymmetric.scales.tolist(), asymmetric.zeros.tolist()) == ([[1.0], [1.0]], [[0], [5]])
    assert unpack_nibbles(asymmetric.values, 3).tolist() == [[0, 15, 7], [0, 15, 8]]
    int8 = quantize(torch.tensor([[127.0, -127, 0.6, -0.4]]), "int8")
    assert int8.values.tolist() == [[127, -127, 1, 0]]
    nf4 = quantize(torch.tensor([[-1.0, 0, 1, 0.09]]), "nf4", 32)
    assert unpack_nibbles(nf4.values, 4).tolist() == [[0, 7, 15, 8]]


@pytest.mark.parametrize(("format", "zero_points"), ALL)
def test_clip_lessens_the_error_of_every_group(format, zero_points):
    weight = torch.randn(20, 256)
    weight[::2, ::64] *= 10
    width = 256 if format == "int8_dynamic" else 64
    full, clipped = (quantize(weight, format, width, zero_points=zero_points, clip=c) for c in (None, "mse"))
    full, clipped = (
        (dequantize(q) - weight).square().unflatten(1, (-1, width)).sum(-1) for q in (full, clipped)
    )
    assert (clipped <= full).all()
    if not format.startswith("int8"):  # 8 bits of normal weights are best used in full
        assert clipped.sum() < full.sum()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_shape(data):
    format, zero_points = data.draw(st.sampled_from(ALL))
    rows, depth = data.draw(st.sampled_from([0, 1, 3, 17])), data.draw(st.integers(1, 140))
    group_size = grouped(format, data.draw(st.sampled_from([32, 64, 128, -1, depth])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weight = torch.randn(depth, rows).to(dtype).mT
    weight[:, ::5] = 0
    quantized = quantize(weight, format, group_size, zero_points=zero_points)
    numbers = dequantize(quantized)
    assert numbers.shape == (rows, depth)
    assert quantized.scales.dtype == torch.bfloat16
    assert (numbers[:, ::5] == 0).all()
    assert (numbers - weight).abs().sum() <= 0.3 * weight.abs().sum()
    assert same_bits(dequantize(ops.unpack_linear(ops.pack_linear(quantized))), numbers)
    assert same_bits(dequantize(quantized, torch.bfloat16), numbers.bfloat16())


@pytest.mark.parametrize(("format", "zero_points"), ALL)
def test_no_columns(format, zero_points):
    for group_size in (32, -1):
        group_size = grouped(format, group_size)
        quantized = quantize(torch.zeros(3, 0), format, group_size, zero_points=zero_points)
        assert quantized.scales.shape == (3, 1)
        assert dequantize(quantized).shape == (3, 0)
        assert dequantize(ops.unpack_linear(ops.pack_linear(quantized))).shape == (3, 0)


@given(st.integers(0, 9), st.integers(0, 9))
def test_nibbles(rows, depth):
    codes = torch.randint(0, 16, (rows, depth), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes), depth), codes)


def test_rows_are_independent_of_each_other():
    """They are quantized some at a time."""
    weight = torch.randn(300, 4096)
    whole, one = quantize(weight, "nf4", clip="mse"), quantize(weight[-1:], "nf4", clip="mse")
    assert torch.equal(whole.values[-1:], one.values)
    assert torch.equal(whole.scales[-1:], one.scales)


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.zeros(3), ("int8",), r"float32\[3\] is no matrix"),
        (torch.zeros(2, 3, 4, 5), ("int8",), r"float32\[2, 3, 4, 5\] is no"),
        (torch.zeros(3, 4, dtype=torch.float64), ("int8",), r"float64\[3, 4\] is no"),
        (torch.zeros(3, 4, dtype=torch.int8), ("int8",), r"int8\[3, 4\] is no"),
        (torch.zeros(3, 4, device="meta"), ("int8",), r"float32\[3, 4\] meta is no"),
        (torch.tensor([[1, torch.nan]]), ("int4",), r"float32\[1, 2\] has NaN or Inf"),
        (torch.tensor([[-torch.inf, 1]]).half(), ("nf4",), r"float16\[1, 2\] has NaN or Inf"),
        (torch.zeros(3, 48), ("int5",), r"float32\[3, 48\]: format = 'int5' is none of"),
        (
            torch.zeros(3, 48),
            ("int4", 16),
            r"float32\[3, 48\]: group_size = 16 of int4 is none of 32, 64",
        ),
        (torch.zeros(3, 48), ("nf4", 256), "group_size = 256 of nf4"),
        (torch.zeros(3, 48), ("int4", 0), "group_size = 0 of int4"),
        (torch.zeros(3, 48), ("int4", True), "group_size = True of int4"),
        (torch.zeros(3, 48), ("int4", "32"), "group_size = '32' of int4"),
        (torch.zeros(3, 48), ("int4", -2), "group_size = -2 of int4"),
        (torch.zeros(3, 48), ("int8", 16), "group_size = 16 of int8 is none of 32, 64"),
        (torch.zeros(3, 48), ("int8_dynamic", 32), "group_size = 32 of int8_dynamic is none of in_feat"),
    ],
)
def test_bad_input(weight, arguments, message):
    with pytest.raises(wf.InputError, match=message):
        quantize(weight, *arguments)


def test_bad_options():
    weight = torch.zeros(2, 32)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, not list"):
        quantize([[1.0]], "int8")
    with pytest.raises(wf.InputError, match="clip = 'max' is neither None nor 'mse'"):
        quantize(weight, "int4", clip="max")
    for format in ("int8", "int8_dynamic", "nf4"):
        with pytest.raises(wf.InputError, match=f"zero_points: {format} is symmetric"):
            quantize(weight, format, zero_points=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: {"scales": q.scales[:, :1]}, r"scales = bfloat16\[5, 1\] of int4 is not .*\[5, 2\]"),
        (lambda q: {"scales": q.scales[1:]}, r"scales = bfloat16\[4, 2\]"),
        (lambda q: {"scales": q.scales.double()}, r"scales = float64\[5, 2\]"),
        (lambda q: {"scales": q.scales / 0}, r"scales = bfloat16\[5, 2\] has NaN or Inf"),
        (lambda q: {"zeros": q.zeros[:, :1]}, r"zeros = uint8\[5, 1\]"),
        (lambda q: {"zeros": q.zeros + 16}, r"zeros = uint8\[5, 2\] has values above 15"),
        (lambda q: {"zeros": q.zeros.int()}, r"zeros = int32\[5, 2\]"),
        (lambda q: {"values": q.values[:, 1:]}, r"values = uint8\[5, 16\] of int4 is not uint8\[5, 17\]"),
        (lambda q: {"values": q.values[0]}, r"values = uint8\[17\]"),
        (lambda q: {"format": "int8"}, "zero_points: int8 is symmetric"),
        (lambda q: {"in_features": 99}, r"values = uint8\[5, 17\]"),
        (lambda q: {"group_size": 64}, r"scales = bfloat16\[5, 2\]"),
        (lambda q: {"group_size": 31}, "group_size = 31"),
    ],
)
def test_quantized_weight_that_does_not_fit(change, message):
    quantized = quantize(torch.randn(5, 33), "int4", 32, zero_points=True)
    with pytest.raises(wf.InputError, match=message):
        dequantize(quantized._replace(**change(quantized)))


@pytest.mark.parametrize(("format", "zero_points"), ALL)
def test_the_kernel_multiplies_by_these_numbers(device, format, zero_points):
    quantized = quantize(torch.randn(96, 200), format, grouped(format, 64), zero_points=zero_points)
    x = torch.randn(64, 200)
    out = ops.linear(x, ops.pack_linear(quantized))
    own = 0.02 if format.endswith("dynamic") else 1e-5
    assert relative_error(out, x.double() @ dequantize(quantized, torch.float64).mT) <= own


def test_outlier_channels_do_not_hurt_int4_dynamic(device):
    """Activations are quantized per 32 of them: 4 channels 50 times as large only blur their neighbours."""
    weight, x = torch.randn(256, 4096), torch.randn(16, 4096)
    x[:, [7, 1000, 2049, 4095]] *= 50
    quantized = quantize(weight, "int4_dynamic", 32)
    exact = x.double() @ weight.double().mT
    own = relative_error(x.double() @ dequantize(quantized, torch.float64).mT, exact)
    found = relative_error(ops.linear(x, ops.pack_linear(quantized)), exact)
    assert found <= own + 0.015


def test_every_format_is_tested():
    assert {format for format, _ in ALL} == set(FORMATS)


@pytest.mark.parametrize(("format", "zero_points"), ALL)
@pytest.mark.parametrize(
    ("shape", "gated"), [((100, 64), False), ((100, 64), True), ((3, 70, 64), True), ((2, 0, 64), False)]
)
def test_packing_some_rows_at_a_time_changes_nothing(format, zero_points, shape, gated, monkeypatch):
    weight, options = torch.randn(shape), {"group_size": grouped(format, 32), "zero_points": zero_points}
    expected = ops.pack_linear(quantize(weight, format, **options), gated=gated)
    monkeypatch.setattr(sys.modules[quantize.__module__], "CHUNK", 32 * 64)
    for strided in (weight, weight.mT.contiguous().mT):
        found = quantize_packed(strided, format, gated=gated, **options)
        assert torch.equal(found.data, expected.data)
        assert found[1:] == expected[1:]
