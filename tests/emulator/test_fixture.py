"""The `device` fixture of tests/conftest.py on "emulated"."""

import pytest

from tests.conftest import _cuda_kernels_for_cpu_tensors, _schedule
from warpformer import _C, _emulated


def test_no_cpu_kernel_answers_for_a_missing_cuda_kernel():
    kernels = {name for name in dir(_C) if "executor: " in (getattr(_C, name).__doc__ or "")}
    missing = kernels - set(dir(_emulated))
    assert missing  # roofline's, which measure the CPU
    before = {name: getattr(_C, name) for name in kernels}
    with _cuda_kernels_for_cpu_tensors("fifo", 80):
        for name in missing:
            with pytest.raises(NotImplementedError, match=name):
                getattr(_C, name)()
        for name in kernels - missing:
            assert getattr(_C, name) is getattr(_emulated, name)
    assert {name: getattr(_C, name) for name in kernels} == before


def test_a_test_keeps_its_schedule_and_tests_differ(monkeypatch):
    monkeypatch.delenv("WARPFORMER_EMULATOR_SEED", raising=False)
    names = [f"test_values[{i}]" for i in range(100)]
    schedules = [_schedule(name) for name in names]
    assert schedules == [_schedule(name) for name in names]
    assert {"fifo", "lifo"} < set(schedules)
    assert len(set(schedules)) > 40
    monkeypatch.setenv("WARPFORMER_EMULATOR_SEED", "17")
    assert _schedule("any") == "17"


@pytest.mark.parametrize("schedule", ["", "lifo ", "-1", "1.5"])
def test_an_unknown_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match="neither fifo, lifo nor a seed"):
        _emulated.set_schedule(schedule)
