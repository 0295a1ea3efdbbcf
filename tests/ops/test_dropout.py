import pytest
import torch

from tests.check import check, check_gradients, same_bits, threads
from warpformer import ops

WORD = 2**32
MULTIPLIERS, KEY_STEPS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def philox(counter, key):
    """Philox4x32-10 as Salmon et al. write it, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        products = [m * x for m, x in zip(MULTIPLIERS, (c[0], c[2]), strict=True)]
        (high0, low0), (high1, low1) = (divmod(p, WORD) for p in products)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(x + step) % WORD for x, step in zip(k, KEY_STEPS, strict=True)]
    return c


def words(seed, count):
    key = (seed % WORD, seed // WORD % WORD)
    drawn = [word for n in range(-(-count // 4)) for word in philox((n % WORD, n // WORD, 0, 0), key)]
    return torch.tensor(drawn[:count])


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD - 1,) * 4, (WORD - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    """Those of Random123: of the generator that the ops are compared with below."""
    assert tuple(philox(counter, key)) == expected


@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (5, 1), (2100,), (7, 67), (3, 5, 31), (2, 2049)])
def test_mask_of_every_shape(device, dtype, shape):
    assert_mask(shape, dtype, 2**40 + 3, 0.3, device)


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_mask_of_every_seed(device, seed, p):
    assert_mask((7, 67), torch.float32, seed, p, device)


def assert_mask(shape, dtype, seed, p, device):
    """Element i, in row-major order, is kept where word i is at least p 2^32."""
    x = torch.randn(shape, dtype=dtype)
    kept = (words(seed, x.numel()).to(device) >= int(p * WORD)).view(shape)
    expected = torch.where(kept, (x.double() / (1 - p)).to(dtype), 0)
    for layout in (x, x.mT.contiguous().mT if x.ndim > 1 else x, x.expand(2, *shape)[0]):
        out = ops.dropout(layout, p, seed=seed)
        assert torch.equal(out != 0, kept)
        torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("n", [1, 17, 256, 5000])
def test_values(device, dtype, n, with_residual):
    x, residual = torch.randn(2, 5000 // n + 1, n, dtype=dtype)
    mask = words(5, x.numel()).view(x.shape) >= int(0.3 * WORD)
    mask = mask.to(device)
    inputs = (x, residual) if with_residual else (x,)
    for judge in (check, check_gradients):
        judge(
            lambda x, r=None: ops.dropout(x, 0.3, residual=r, seed=5),
            lambda x, r=0: torch.where(mask, x / (1 - 0.3), 0) + r,
            *inputs,
        )


def test_seeds(device):
    """From torch's generator, or given as a number or a tensor."""
    x = torch.randn(40, 100)
    assert not torch.equal(ops.dropout(x), ops.dropout(x))
    torch.manual_seed(3)
    first = ops.dropout(x)
    torch.manual_seed(3)
    assert same_bits(ops.dropout(x), first)
    tensor = torch.tensor([2**40 + 3])
    assert same_bits(ops.dropout(x, seed=tensor), ops.dropout(x, seed=2**40 + 3))
    with pytest.raises(TypeError, match=r"dropout: seed must be an int or a torch\.Tensor, not float"):
        ops.dropout(x, seed=1.0)


def test_rate(device):
    kept = ops.dropout(torch.ones(200, 100), 0.2, seed=11) > 0
    assert abs(kept.float().mean().item() - 0.8) < 5 * (0.8 * 0.2 / 20000) ** 0.5


@pytest.mark.parametrize("residual", [None, torch.full((3, 50), 2.0)])
def test_nothing_everything_and_evaluation(device, dtype, residual):
    x = torch.randn(3, 50, dtype=dtype)
    x[1, ::7] = torch.nan
    other = None if residual is None else residual.to(device, dtype)
    kept, nothing = (x, torch.zeros_like(x)) if other is None else (x + other, other)
    for p, training, expected in ((0.0, True, kept), (1.0, True, nothing), (0.7, False, kept)):
        leaf = x.clone().requires_grad_()
        out = ops.dropout(leaf, p, training, residual=other, seed=1)
        torch.testing.assert_close(out.detach(), expected, rtol=0, atol=0, equal_nan=True)
        out.sum().backward()
        assert same_bits(leaf.grad, torch.full_like(x, 0.0 if p == 1 else 1.0))
    assert ops.dropout(x, training=False) is x


def test_dropped_nan_leaves_nothing(device, dtype):
    out = ops.dropout(torch.full((40, 100), torch.nan, dtype=dtype), 0.5, seed=2)
    assert torch.equal(out.isnan(), (words(2, 4000) >= WORD // 2).view(40, 100).to(device))
    assert (out[~out.isnan()] == 0).all()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_threads(device, count):
    x = torch.randn(4, 20001)
    expected = ops.dropout(x, 0.4, seed=9)
    with threads(count):
        assert same_bits(ops.dropout(x, 0.4, seed=9), expected)


def test_out(device, dtype):
    x, residual = torch.randn(2, 40, 131, dtype=dtype)
    expected = ops.dropout(x, 0.3, residual=residual, seed=7)
    wide = torch.full((40, 262), torch.nan, dtype=dtype)
    for out in (wide[:, :131], wide[:, ::2], x.clone()):
        assert ops.dropout(x, 0.3, residual=residual, seed=7, out=out) is out
        assert same_bits(out, expected)
    for target in (x, residual):
        copy = target.clone()
        operands = {"input": copy, "residual": residual} if target is x else {"input": x, "residual": copy}
        assert same_bits(ops.dropout(**operands, p=0.3, seed=7, out=copy), expected)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_small_shapes(device, dtype, shape):
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out = ops.dropout(x, 0.5, seed=1)
    assert same_bits(out.detach(), torch.zeros(shape, dtype=dtype))
    out.sum().backward()
    assert x.grad.shape == shape


def test_compiled_draws_anew(device):
    x = torch.randn(40, 100, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(second.sum(), x)
    assert torch.equal(gradient != 0, second != 0)
