import pytest
import torch
import torch.nn.functional as F

from tests.check import check, same_bits
from warpformer import ops

FORMS = pytest.mark.parametrize("form", ["none", "tanh"])


@FORMS
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 32, 33, 255, 256, 257])
def test_values(device, dtype, form, n):
    x, bias = torch.randn(4096 // n + 1, n, dtype=dtype), torch.randn(n, dtype=dtype)
    check(lambda x: ops.gelu(x, approximate=form), lambda x: F.gelu(x, approximate=form), x)
    check(
        lambda x, b: ops.gelu(x, approximate=form, bias=b),
        lambda x, b: F.gelu(x + b, approximate=form),
        *(x, bias),
    )


@FORMS
@pytest.mark.parametrize(
    ("low", "high"), [(-12, -6), (-6, -4), (-4, -2), (-2, 0), (-1e-3, 1e-3), (0, 2), (2, 6), (6, 1000)]
)
def test_every_range(device, dtype, form, low, high):
    x = torch.empty(5000).uniform_(low, high).to(dtype)
    check(lambda x: ops.gelu(x, approximate=form), lambda x: F.gelu(x, approximate=form), x)


@FORMS
@pytest.mark.parametrize("copies", [1, 16])  # of each value: the tail of a register, and whole ones
def test_extreme_values(device, dtype, form, copies):
    huge = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, huge, 100.0, 0.0, -100.0, -huge, -torch.inf, torch.nan], dtype=dtype)
    limit = torch.tensor([torch.inf, huge, 100.0, 0.0, 0.0, 0.0, 0.0, torch.nan], dtype=dtype)
    out = ops.gelu(x.repeat_interleave(copies), approximate=form)
    torch.testing.assert_close(out, limit.repeat_interleave(copies), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,)])
def test_small_shapes(device, dtype, shape):
    assert same_bits(ops.gelu(torch.zeros(shape, dtype=dtype)), torch.zeros(shape, dtype=dtype))
