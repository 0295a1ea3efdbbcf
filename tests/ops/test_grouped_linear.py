import pytest
import torch
import torch.nn.functional as F

from tests.check import check_gradients, host_reads, relative_error, same_bits
from tests.ops.test_quantized_linear import FORMATS, random_weight
from warpformer import _C, InputError, ops
from warpformer.ops import _kept, _runs


def has_cuda_kernel(params):
    """Products of dense weights are torch's on CUDA."""
    return "format" in params


ROWS, EXPERTS = 41, 4
ENDS = ([3, 3, 40, 41], [0, 0, 0, 41], [41, 41, 41, 41], [10, 20, 30, 41])


def quantized_experts(n, k, format, group_size):
    weights = [random_weight(n, k, format, group_size, format == "int4") for _ in range(EXPERTS)]
    values, scales, zeros = list(zip(*weights, strict=True))[:3]
    zeros = None if zeros[0] is None else torch.stack(zeros)
    return ops.QuantizedWeight(torch.stack(values), torch.stack(scales), zeros, *weights[0][3:])


def expert(packed, e):
    return packed._replace(data=packed.data[e])


def by_expert(op, offsets, x, weight, bias):
    rows = x.tensor_split(offsets[:-1])
    return torch.cat([op(*of_expert) for of_expert in zip(rows, weight, bias, strict=True)])


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_each_expert_is_a_linear(device, dtype, ends, gated):
    x, bias = torch.randn(ROWS, 70, dtype=dtype), torch.randn(EXPERTS, 80, dtype=dtype)
    packed = ops.pack_linear(torch.randn(EXPERTS, 80, 70, dtype=dtype), gated=gated)
    for offsets in (torch.tensor(ends), torch.tensor(ends, dtype=torch.int32)):
        out = ops.grouped_linear(x, packed, offsets, bias, activation="silu")
        weights = [expert(packed, e) for e in range(EXPERTS)]
        expected = by_expert(lambda *args: ops.linear(*args, activation="silu"), ends, x, weights, bias)
        assert same_bits(out, expected)


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("gated", [False, True])
def test_quantized(device, format, group_size, gated):
    x, weight = torch.randn(ROWS, 70), quantized_experts(48, 70, format, group_size)
    packed = ops.pack_linear(weight, gated=gated)
    out = ops.grouped_linear(x, packed, torch.tensor(ENDS[0]))
    weights = [expert(packed, e) for e in range(EXPERTS)]
    assert same_bits(out, by_expert(ops.linear, ENDS[0], x, weights, [None] * EXPERTS))
    unpacked = ops.unpack_linear(packed)
    assert torch.equal(unpacked.values, weight.values)
    assert torch.equal(unpacked.scales, weight.scales.float())


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("ends", [[1, 1, 1, 1], [3, 20, 21, 33], [0, 63, 64, 150]], ids=str)
def test_tiles_of_every_size(device, dtype, format, group_size, ends):
    """Of 8, 16 and 64 tokens, whose first rows may be any."""
    x, bias = torch.randn(ends[-1], 70, dtype=dtype), torch.randn(EXPERTS, 40, dtype=dtype)
    packed = ops.pack_linear(quantized_experts(40, 70, format, group_size))
    offsets = torch.tensor(ends, dtype=torch.int32)
    out = ops.grouped_linear(x, packed, offsets, bias, activation="silu")
    weights = [expert(packed, e) for e in range(EXPERTS)]
    expected = by_expert(lambda *args: ops.linear(*args, activation="silu"), ends, x, weights, bias)
    assert same_bits(out, expected)


@pytest.mark.parametrize("format", ["int8"])
@pytest.mark.parametrize("rows", [0, 1, 90])
def test_many_experts(device, format, rows):
    """Those of a warp and more, most without rows."""
    weights = [random_weight(16, 40, format) for _ in range(70)]
    values, scales = (torch.stack(t) for t in list(zip(*weights, strict=True))[:2])
    packed = ops.pack_linear(weights[0]._replace(values=values, scales=scales))
    ends = [0] * 20 + [rows // 3] * 12 + [rows // 2] * 37 + [rows]
    x = torch.randn(rows, 40)
    out = ops.grouped_linear(x, packed, torch.tensor(ends))
    weights = [expert(packed, e) for e in range(70)]
    assert same_bits(out, by_expert(ops.linear, ends, x, weights, [None] * 70))


@pytest.mark.parametrize(("format", "group_size"), FORMATS)
@pytest.mark.parametrize("ends", ENDS[:2], ids=str)
def test_gradients_of_the_input_and_the_bias(device, dtype, format, group_size, ends):
    x, bias = torch.randn(ROWS, 70, dtype=dtype), torch.randn(EXPERTS, 40, dtype=dtype)
    packed = ops.pack_linear(quantized_experts(40, 70, format, group_size))
    x, bias = x.requires_grad_(), bias.requires_grad_()
    out = ops.grouped_linear(x, packed, torch.tensor(ends), bias)
    grad = torch.randn_like(out)
    dx, db = torch.autograd.grad(out, (x, bias), grad)
    weights = [expert(packed, e) for e in range(EXPERTS)]
    expected = by_expert(ops.linear, ends, x, weights, bias)
    assert same_bits(dx, torch.autograd.grad(expected, x, grad)[0])
    sums = torch.stack([rows.double().sum(0) for rows in grad.tensor_split(ends[:-1])])
    assert relative_error(db, sums) < torch.finfo(dtype).eps


@pytest.mark.parametrize("format", ["int4"])
@pytest.mark.parametrize("wide", [False, True])
def test_offsets_that_a_host_does_not_read(device, format, wide):
    """They are made to ascend; rows past the last one are those of nobody, and 0. A host refuses them."""
    packed = ops.pack_linear(quantized_experts(24, 70, format, 32))
    largest, dtype = (2**62, torch.int64) if wide else (2**31 - 1, torch.int32)
    for given, ends in (
        ([-largest, 30, 20, 35], [0, 30, 30, 35]),
        ([10, largest, 3, -1], [10, ROWS, ROWS, ROWS]),
        ([-1, -largest, -3, -2], [0, 0, 0, 0]),
    ):
        x = torch.randn(ROWS, 70, requires_grad=True)
        if host_reads(_C.grouped_linear):
            with pytest.raises(InputError, match=r"grouped_linear.*offsets"):
                ops.grouped_linear(x, packed, torch.tensor(given, dtype=dtype), activation="silu")
            continue
        out = ops.grouped_linear(x, packed, torch.tensor(given, dtype=dtype), activation="silu")
        expected = ops.grouped_linear(x, packed, torch.tensor(ends), activation="silu")
        assert same_bits(out.detach(), expected.detach())
        assert not out[ends[-1] :].any()
        assert out[: ends[-1]].any(1).all()
        grad = torch.randn_like(out)
        (dx,), (other,) = (torch.autograd.grad(o, x, grad) for o in (out, expected))
        assert same_bits(dx, other)
        assert not dx[ends[-1] :].any()


@pytest.mark.parametrize("gated", [False, True])
def test_gradients(device, dtype, gated):
    x, bias = torch.randn(ROWS, 33, dtype=dtype), torch.randn(EXPERTS, 40, dtype=dtype)
    weight = torch.randn(EXPERTS, 40, 33, dtype=dtype) / 6
    packed, offsets = ops.pack_linear(weight, gated=gated), torch.tensor(ENDS[0])

    def reference(x, bias):
        def layer(x, weight, bias):
            z = F.linear(x, weight.to(x.dtype), bias)
            return F.silu(z[:, :20]) * z[:, 20:] if gated else F.silu(z)

        return by_expert(layer, ENDS[0], x, weight, bias)

    check_gradients(
        lambda x, bias: ops.grouped_linear(x, packed, offsets, bias, activation="silu"), reference, x, bias
    )


def tensors(n, k, dtype):
    """Input, weights and biases."""
    weight = torch.randn(EXPERTS, n, k, dtype=dtype) / k**0.5
    return torch.randn(ROWS, k, dtype=dtype), weight, torch.randn(EXPERTS, n, dtype=dtype)


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_a_tensor_has_the_bits_of_its_pack(device, dtype, ends, gated):
    x, weight, bias = tensors(40, 33, dtype)
    offsets, packed = torch.tensor(ends), ops.pack_linear(weight, gated=gated)
    expected = ops.grouped_linear(x, packed, offsets, bias, activation="silu")
    for w in (weight, weight.mT.contiguous().mT, weight.clone().requires_grad_()):
        out = ops.grouped_linear(x, w, offsets, bias, activation="silu", gated=gated)
        assert same_bits(out.detach(), expected)


@pytest.mark.parametrize("ends", ENDS[:2], ids=str)
@pytest.mark.parametrize(("activation", "gated"), [("none", False), ("gelu", False), ("silu", True)])
def test_gradients_of_a_tensor(device, dtype, ends, activation, gated):
    offsets = torch.tensor(ends)

    def reference(x, weight, bias):
        def layer(x, weight, bias):
            z = F.linear(x, weight, bias)
            if gated:
                return F.silu(z[:, :20]) * z[:, 20:]
            return z if activation == "none" else F.gelu(z)

        return by_expert(layer, ends, x, weight, bias)

    check_gradients(
        lambda x, w, b: ops.grouped_linear(x, w, offsets, b, activation=activation, gated=gated),
        reference,
        *tensors(40, 33, dtype),
    )


def test_experts_without_rows_have_no_gradient():
    x, weight, bias = (t.requires_grad_() for t in tensors(40, 33, torch.float32))
    ops.grouped_linear(x, weight, torch.tensor([0, 20, 20, 41]), bias).sum().backward()
    for gradient in (weight.grad, bias.grad):
        assert [bool(of_expert.any()) for of_expert in gradient] == [False, True, False, True]


@pytest.mark.parametrize("shape", [(0, 40, 33), (EXPERTS, 0, 33), (EXPERTS, 40, 0)])
def test_shapes_of_gradients(device, shape):
    rows = ROWS if shape[0] else 0
    x, weight = torch.randn(rows, shape[2], requires_grad=True), torch.randn(shape, requires_grad=True)
    bias, ends = torch.randn(shape[:2], requires_grad=True), ENDS[0] if rows else []
    out = ops.grouped_linear(x, weight, torch.tensor(ends, dtype=torch.int64), bias)
    out.sum().backward()
    assert out.shape == (rows, shape[1])
    for t in (x, weight, bias):
        assert t.grad.shape == t.shape


@pytest.mark.parametrize("gated", [False, True])
def test_a_parameter_is_packed_once(dtype, gated):
    x, weight, _ = tensors(40, 33, dtype)
    weight, offsets = torch.nn.Parameter(weight), torch.tensor(ENDS[0])
    with torch.no_grad():
        first = ops.grouped_linear(x, weight, offsets, gated=gated)
        packs = dict(_kept._packs[weight])
        assert same_bits(ops.grouped_linear(x, weight, offsets, gated=gated), first)
        assert _kept._packs[weight] == packs
        weight.mul_(2)
        again = ops.grouped_linear(x, weight, offsets, gated=gated)
        assert same_bits(again, ops.grouped_linear(x, ops.pack_linear(weight, gated=gated), offsets))


def test_registration_of_a_tensor():
    x, weight, bias = (t.requires_grad_() for t in tensors(40, 33, torch.float32))
    offsets = torch.tensor(ENDS[0])
    library = torch.ops.warpformer
    args = (x, weight, offsets, bias, "silu", True, torch.float32, False)
    torch.library.opcheck(library.dense_grouped_linear.default, args)
    torch.library.opcheck(library.grouped_sum.default, (x.detach(), offsets, torch.bfloat16))
    outer = (x.detach(), torch.randn(ROWS, 5), offsets, torch.float32)
    torch.library.opcheck(library.grouped_outer_product.default, outer)

    def loss(function):
        out = function(x, weight, offsets, bias, activation="silu", gated=True)
        return torch.autograd.grad(out.sum(), (x, weight, bias))

    compiled = torch.compile(ops.grouped_linear, fullgraph=True, backend="aot_eager")
    assert all(map(same_bits, loss(compiled), loss(ops.grouped_linear)))


@pytest.mark.parametrize("ends", [[3, 3, 40, 41], [16, 8, 20, 100]], ids=str)
@pytest.mark.parametrize(("activation", "gated"), [("none", False), ("silu", True)])
@pytest.mark.parametrize("width", [64, 33])
def test_a_gpu_by_torch(dtype, ends, activation, gated, width):
    """What a GPU does with dense weights is torch's, and the same on a CPU."""
    x, weight, bias = tensors(48, width, dtype)
    offsets, ascending = torch.tensor(ends), [min(max(ends[: e + 1]), ROWS) for e in range(EXPERTS)]
    if ends != ascending and (width == 33 or dtype != torch.bfloat16):
        with pytest.raises(InputError, match=r"grouped_linear.*offsets"):
            _runs.linear(x, weight, offsets, bias, activation, gated)
        return
    ends = torch.tensor(ascending)

    def check_close(out, expected):
        assert relative_error(out, expected.double()) < 2 * torch.finfo(dtype).eps

    expected = ops.grouped_linear(x, weight, ends, bias, activation=activation, gated=gated)
    out = _runs.linear(x, weight, offsets, bias, activation, gated)
    check_close(out, expected)
    library = torch.ops.warpformer
    grad = torch.randn(ROWS, 48, dtype=dtype)
    expected = library.grouped_outer_product(grad, x, ends, dtype)
    check_close(_runs.outer_product(grad, x, offsets, dtype), expected)
    sums = library.grouped_sum(grad, ends, dtype)
    check_close(_runs.sum_rows(grad, offsets, dtype), sums)


@pytest.mark.parametrize("ends", [[0, 0, 33, 200], [200] * 4, [64, 96, 96, 150]], ids=str)
def test_sums_by_torch(dtype, ends):
    x = torch.randn(200, 9, dtype=dtype)
    exact = torch.stack([rows.double().sum(0) for rows in x.tensor_split(ends)[:4]])
    assert relative_error(_runs.sum_rows(x, torch.tensor(ends), dtype), exact) < torch.finfo(dtype).eps
    for rows, columns, experts in ((0, 5, 2), (3, 0, 2), (0, 0, 0), (0, 4, 0)):
        offsets = torch.full((experts,), rows)
        sums = _runs.sum_rows(torch.randn(rows, columns, dtype=dtype), offsets, dtype)
        assert torch.equal(sums, torch.zeros(experts, columns, dtype=dtype))


def test_rows_of_no_expert_by_torch():
    x, weight, bias = tensors(48, 64, torch.bfloat16)
    x[20:] = torch.nan
    offsets = torch.tensor([3, 3, 10, 20])
    assert not _runs.linear(x, weight, offsets, bias, "silu", True)[20:].any()
    assert _runs.outer_product(x, x, offsets, x.dtype).isfinite().all()
    assert _runs.sum_rows(x, offsets, x.dtype).isfinite().all()


def test_autocast_of_a_tensor():
    x, weight, bias = (t.requires_grad_() for t in tensors(40, 33, torch.float32))
    offsets = torch.tensor(ENDS[0])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.grouped_linear(x, weight, offsets, bias)
    assert same_bits(out, ops.grouped_linear(x.bfloat16(), weight.bfloat16(), offsets, bias))
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias))


def test_autocast():
    x, packed = torch.randn(ROWS, 16), ops.pack_linear(torch.randn(EXPERTS, 8, 16))
    offsets = torch.tensor(ENDS[0])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.grouped_linear(x, packed, offsets)
    assert same_bits(out, ops.grouped_linear(x.bfloat16(), packed, offsets))


@pytest.mark.parametrize(
    "offsets",
    [
        torch.tensor([3, 2, 40, 41]),
        torch.tensor([0, 1, 2, 42]),
        torch.tensor([0, 1, 2, 40]),
        torch.tensor([-1, 1, 2, 41]),
        torch.tensor([20, 20, 41]),
        torch.tensor([[3, 3, 40, 41]]),
        torch.tensor([3.0, 3.0, 40.0, 41.0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["packed", "trained", "kept"])
def test_bad_offsets(offsets, kind):
    weight = torch.nn.Parameter(torch.randn(EXPERTS, 8, 16), requires_grad=kind == "trained")
    weight = ops.pack_linear(weight) if kind == "packed" else weight
    with pytest.raises(InputError, match=r"grouped_linear.*offsets"):
        ops.grouped_linear(torch.randn(ROWS, 16), weight, offsets)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(8,), (EXPERTS, 7), (EXPERTS + 1, 8)])
def test_bad_bias(shape, trained):
    weight = torch.nn.Parameter(torch.randn(EXPERTS, 8, 16), requires_grad=trained)
    with pytest.raises(InputError, match=r"grouped_linear.*bias"):
        ops.grouped_linear(torch.randn(ROWS, 16), weight, torch.tensor(ENDS[0]), torch.randn(shape))


def test_a_linear_is_no_expert():
    with pytest.raises(InputError, match=r"grouped_linear.*weight"):
        ops.grouped_linear(torch.randn(4, 16), ops.pack_linear(torch.randn(8, 16)), torch.tensor([4]))
    with pytest.raises(InputError, match=r"input = float32\[4, 16\] does not fit weight = float32\[8, 16\]"):
        ops.grouped_linear(torch.randn(4, 16), torch.randn(8, 16), torch.tensor([4]))
    packed = ops.pack_linear(torch.randn(1, 8, 16))
    with pytest.raises(InputError, match="packed with gated = False"):
        ops.grouped_linear(torch.randn(4, 16), packed, torch.tensor([4]), gated=True)
    with pytest.raises(InputError, match="packed"):
        ops.linear(torch.randn(4, 16), ops.pack_linear(torch.randn(1, 8, 16)))
