import pytest

from tests.emulator.plants import SCHEDULES
from warpformer import _emulated


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    yield request.param
    _emulated.set_schedule("fifo")
    _emulated.set_resident_blocks(4)
