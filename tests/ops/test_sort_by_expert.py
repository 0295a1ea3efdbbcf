import pytest
import torch

from tests.check import check_gradients, host_reads, same_bits, threads
from warpformer import _C, InputError, ops
from warpformer.ops._recording import Recording

SHAPES = [(0, 2), (1, 1), (1, 8), (3, 2), (33, 1), (65, 2), (257, 8)]
EXPERTS = (1, 3, 8, 160, 256, 1024)


def sorted_by_torch(ids, experts):
    """What `Experts` did before there was a kernel."""
    ids, order = ids.flatten().long().sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(experts), right=True)
    return order, order.argsort(), offsets.int()


def check_sort(ids, experts):
    order, places, offsets = ops.sort_by_expert(ids, experts)
    expected = sorted_by_torch(ids, experts)
    assert places.shape == ids.shape
    for found, right in zip((order, places.flatten(), offsets), expected, strict=True):
        assert same_bits(found, right)


def summed_by_torch(rows, weights, places):
    total = torch.zeros(len(places), rows.shape[1])
    for j, place in enumerate(places.unbind(1)):
        row = rows.index_select(0, place).float()
        total += row if weights is None else row.mul_(weights[:, j, None])
    return total.to(rows.dtype)


def routes(tokens, k, experts=5):
    order, places, _ = ops.sort_by_expert(torch.randint(experts, (tokens, k)), experts)
    return order, places


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_order(device, shape, experts):
    check_sort(torch.randint(experts, shape), experts)


@pytest.mark.parametrize("experts", [3, 160])
@pytest.mark.parametrize("popular", [0, 2])
def test_many_to_one_expert(device, experts, popular):
    ids = torch.full((700, 2), popular)
    check_sort(ids, experts)
    ids[::9, 1] = torch.randint(experts, (78,))
    check_sort(ids, experts)


def test_ids_of_any_layout(device):
    ids = torch.randint(7, (70, 3))
    for same in (
        ids.int(),
        ids.mT.contiguous().mT,
        ids.repeat_interleave(2, 1)[:, ::2],
        ids[:1].expand(70, 3),
    ):
        check_sort(same, 7)


@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**40)])
@pytest.mark.parametrize("at", [(0, 0), (80, 1)])
def test_no_such_expert(device, wrong, at):
    ids = torch.randint(5, (81, 2))
    ids[at] = wrong
    if host_reads(_C.sort_by_expert):
        with pytest.raises(
            InputError, match=rf"^sort_by_expert: .* expert = {wrong}, .* expert_ids = i64\[81,2\]"
        ):
            ops.sort_by_expert(ids, 5)
        return
    order, places, offsets = ops.sort_by_expert(ids, 5)
    expected = sorted_by_torch(ids.where((ids >= 0) & (ids < 5), 5), 5)
    assert offsets[-1] == 161
    for found, right in zip((order, places.flatten(), offsets), expected, strict=True):
        assert same_bits(found, right)


def test_no_experts(device):
    order, places, offsets = ops.sort_by_expert(torch.zeros(0, 2, dtype=torch.int64), 0)
    assert (order.shape, places.shape, offsets.shape) == ((0,), (0, 2), (0,))


@pytest.mark.parametrize("width", [0, 1, 7, 64, 1000, 4104])
@pytest.mark.parametrize(("tokens", "k"), [(0, 2), (1, 1), (1, 8), (37, 3)])
def test_rows_there_and_back(device, dtype, width, tokens, k):
    order, places = routes(tokens, k)
    x, weights = torch.randn(tokens, width, dtype=dtype), torch.randn(tokens, k)
    rows = ops.spread_rows(x, order, places)
    assert same_bits(rows, x.index_select(0, order // k))
    rows = torch.randn_like(rows)
    for w in (None, weights, weights.to(dtype), weights.mT.contiguous().mT):
        assert same_bits(ops.sum_rows(rows, w, order, places), summed_by_torch(rows, w, places))


def test_nothing_is_fused(device):
    """1 + 2^-12 squared is rounded before 1 is taken from it, in every column."""
    order, places, _ = ops.sort_by_expert(torch.tensor([[0, 1]]), 2)
    x = 1 + 2.0**-12
    rows = torch.tensor([-1.0, x]).repeat_interleave(77).view(2, 77)
    out = ops.sum_rows(rows, torch.tensor([[1.0, x]]), order, places)
    assert same_bits(out, torch.full((1, 77), 2.0**-11))


def test_signs_and_what_is_not_finite(device, dtype):
    order, places = routes(4, 2)
    x = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)[:, None].expand(4, 24)
    rows = ops.spread_rows(x, order, places)
    assert same_bits(rows, x[order // 2])
    out, expected = (
        f(rows)
        for f in (lambda r: ops.sum_rows(r, None, order, places), lambda r: summed_by_torch(r, None, places))
    )
    assert same_bits(out[:3], expected[:3])
    assert out[3].isnan().all()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_token_alone(device, dtype, weighted):
    order, places = routes(50, 4)
    rows, weights = torch.randn(200, 72, dtype=dtype), torch.rand(50, 4)
    together = ops.sum_rows(rows, weights if weighted else None, order, places)
    for n in (0, 49):
        own, alone = rows[places[n]], torch.arange(4)
        out = ops.sum_rows(own, weights[n : n + 1] if weighted else None, alone, alone[None])
        assert same_bits(out[0], together[n])


def test_any_number_of_threads(device, dtype):
    order, places = routes(50, 4)
    x, weights = torch.randn(50, 3000, dtype=dtype), torch.rand(50, 4)
    for count in (1, 2, 3):
        with threads(count):
            rows = ops.spread_rows(x, order, places)
            assert same_bits(rows, x[order // 4])
            assert same_bits(
                ops.sum_rows(rows, weights, order, places), summed_by_torch(rows, weights, places)
            )


@pytest.mark.parametrize("wrong", [-1, 74, 2**40])
def test_what_is_not_there(device, dtype, wrong):
    order, places = routes(37, 2)
    x = torch.randn(37, 72, dtype=dtype)
    rows = ops.spread_rows(x, order, places)
    bad_order, bad_places = order.clone(), places.clone()
    bad_order[5], bad_places[7, 1] = wrong, wrong
    if host_reads(_C.sum_rows):
        with pytest.raises(InputError, match=rf"^spread_rows: .* place = {wrong}, order = i64\[74\]"):
            ops.spread_rows(x, bad_order, places)
        with pytest.raises(InputError, match=rf"^sum_rows: .* row = {wrong}, places = i64\[37,2\]"):
            ops.sum_rows(rows, None, order, bad_places)
        return
    for width in (72, 71):  # by vectors, and element by element
        x, rows = x[:, :width], rows[:, :width].contiguous()
        out = ops.spread_rows(x, bad_order, places)
        assert out[5].isnan().all()
        out[5] = rows[5]
        assert same_bits(out, rows)
        out, right = ops.sum_rows(rows, None, order, bad_places), ops.sum_rows(rows, None, order, places)
        assert out[7].isnan().all()
        out[7] = right[7]
        assert same_bits(out, right)


def test_gradients(device, dtype):
    order, places = routes(37, 3)
    x, rows, weights = (
        torch.randn(37, 131, dtype=dtype),
        torch.randn(111, 131, dtype=dtype),
        torch.rand(37, 3),
    )
    check_gradients(lambda x: ops.spread_rows(x, order, places), lambda x: x[order // 3], x)
    check_gradients(
        lambda *inputs: ops.sum_rows(*inputs, order, places),
        lambda rows, weights: (rows[places] * weights[..., None]).sum(1).to(rows.dtype),
        rows,
        weights,
    )
    grad = torch.randn(111, 131, dtype=dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(ops.spread_rows(x, order, places), x, grad)
    assert same_bits(found, summed_by_torch(grad, None, places))


def test_registration():
    ids = torch.randint(5, (20, 2))
    torch.library.opcheck(torch.ops.warpformer.sort_by_expert.default, (ids, 5))
    compiled = torch.compile(ops.sort_by_expert, fullgraph=True, backend="eager")(ids, 5)
    assert all(map(same_bits, compiled, ops.sort_by_expert(ids, 5)))


def test_recording():
    """Kernels alone, on the same memory."""
    ids, x, weights = torch.randint(5, (3, 2)), torch.randn(3, 16), torch.rand(3, 2)

    def there_and_back():
        order, places, _ = ops.sort_by_expert(ids, 5)
        return ops.sum_rows(ops.spread_rows(x, order, places), weights, order, places)

    recording = Recording(there_and_back, torch.device("cpu"))
    assert recording.is_whole
    assert len(recording._parts) == 1
    ids.random_(5)
    x.normal_()
    assert same_bits(recording(), there_and_back())


def test_more_experts_than_fit():
    with pytest.raises(InputError, match=r"^sort_by_expert: .*num_experts = 1025 is not within 0 to 1024"):
        ops.sort_by_expert(torch.zeros(3, 2, dtype=torch.int64), 1025)
