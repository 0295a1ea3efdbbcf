import pytest

from tests.conftest import ISAS
from tests.process import run
from warpformer import _C, InputError

PRINT_ISA = "from warpformer import _C; print(_C.isa())"


def test_names(device):
    """set_isa, which the device fixture calls, is obeyed; a name that is none lists those that are."""
    with pytest.raises(InputError, match=f'isa "sse9" is none of: {", ".join(ISAS)}$'):
        _C.set_isa("sse9")


@pytest.mark.parametrize("isa", ISAS)
def test_set_isa(device, isa):
    _C.set_isa(isa)  # a cap: what this CPU lacks stays out
    assert _C.isa() == min(isa, _C.best_isa(), key=ISAS.index)


def test_environment_variable():
    assert run(PRINT_ISA, WARPFORMER_ISA="scalar") == "scalar"
    assert run(PRINT_ISA, WARPFORMER_ISA="") == _C.best_isa()


def test_unknown_name_in_the_environment():
    with pytest.raises(AssertionError, match='ImportError: isa "sse9" is none of: scalar, avx2'):
        run(PRINT_ISA, WARPFORMER_ISA="sse9")
