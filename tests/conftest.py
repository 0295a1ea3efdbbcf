import pytest
import torch

from warpformer import _C

pytest.register_assert_rewrite("tests.check")

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")  # worst to best
BEST = _C.isa()  # WARPFORMER_ISA lowers it, and with it every test


# "emulated" and "cuda" will be two more parameters here.
@pytest.fixture(params=ISAS[: ISAS.index(BEST) + 1])
def device(request):
    """Where tensors live; one run of the test per instruction set of this CPU."""
    _C.set_isa(request.param)
    yield torch.device("cpu")
    _C.set_isa(BEST)


@pytest.fixture(params=(torch.float32, torch.bfloat16, torch.float16), ids=("f32", "bf16", "f16"))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)
