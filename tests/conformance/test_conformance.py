"""The emulator against what a GPU gave (golden.json), and the cases themselves."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conformance import __main__ as program
from tests.conformance import cases, golden, plain_cases
from tests.conformance.build import serves, target
from tests.conformance.library import emulated
from warpformer import _emulated

CORE = Path(__file__).parent.parent.parent / "csrc" / "core" / "cuda"
CASES = list(cases())
# The rest is run by tests/emulator/test_{matrix,bulk,wgmma}.py.
PLAIN = [*plain_cases.threads(), *plain_cases.memory()]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_case(case):
    case.check(case.run(emulated()))


def test_names_are_unique():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


def test_every_kernel_has_a_case():
    assert set(emulated().cases) == {case.kernel for case in CASES}


def test_every_primitive_is_called():
    """Whatever the headers of core/cuda declare with a WHERE, but for what stands on the rest (rows.cuh)."""
    folder = Path(__file__).parent
    sources = "".join(path.read_text() for path in [*folder.glob("*.cu"), *folder.glob("*.h")])
    declaration = re.compile(r"^ *DEVICE [^\n(]*?(\w+)\((?:[^()]|\(&\w+\))*\bWHERE\)", re.M)
    headers = [path for path in CORE.glob("*.cuh") if path.name != "rows.cuh"]
    declared = {name for path in headers for name in declaration.findall(path.read_text())}
    assert len(declared) > 60
    assert not [name for name in sorted(declared) if not re.search(rf"\b{name}\b", sources)]


def test_a_wrong_result_is_noticed():
    for case in CASES[:: len(CASES) // 40]:
        got = case.expected.copy()
        got.reshape(-1).view(np.uint8)[: got.itemsize] ^= 0x55
        with pytest.raises(AssertionError, match=re.escape(case.name)):
            case.check(got)


def test_golden_files_hold_what_was_recorded(tmp_path):
    path = tmp_path / "golden.json"
    few = CASES[:: len(CASES) // 60] + [case for case in CASES if case.bound is not None]
    golden.record("a GPU", [(case, case.expected) for case in few], path)
    recorded = golden.Golden(path)
    for case in few:
        recorded.check(case, case.run(emulated()))
        other = case.expected.copy()
        other.reshape(-1).view(np.uint8)[: other.itemsize] ^= 0x55
        with pytest.raises(AssertionError):
            recorded.check(case, other)


def test_golden_files_of_everything_stay_small(tmp_path):
    path = tmp_path / "golden.json"
    golden.record("a GPU", [(case, case.expected) for case in CASES], path)
    assert path.stat().st_size < 200_000


def test_the_program_runs_and_records(tmp_path, monkeypatch, capsys):
    """As on a GPU, with the emulator in its place; one case gives something else."""
    path = tmp_path / "golden.json"
    monkeypatch.setattr(program, "gpu", lambda: ("an emulator", (9, 0)))
    monkeypatch.setattr(program, "build", lambda architecture: _emulated.__file__)
    wrong, missing = CASES[5], CASES[6]
    few = [replace(wrong, expected=wrong.expected + 1), replace(missing, name="unknown"), *CASES[::50]]
    monkeypatch.setattr(program, "cases", lambda: few)
    monkeypatch.setattr(golden.record, "__defaults__", (path,))
    monkeypatch.setattr(sys, "argv", ["conformance", "--record"])
    assert program.main() == 1
    said = capsys.readouterr().out
    assert f"{wrong.name}: " in said
    assert "unknown: the process died" in said
    assert f"an emulator: {len(few) - 1} cases ran, 2 failed, 0 need another GPU" in said
    assert golden.Golden(path).names() == {case.name for case in few if case.name != "unknown"}


def test_what_a_gpu_serves():
    assert [serves(needs, (9, 0)) for needs in ("sm_80", "sm_90", "sm_90a")] == [True, True, True]
    assert [serves(needs, (8, 6)) for needs in ("sm_80", "sm_90", "sm_90a")] == [True, False, False]
    assert [serves(needs, (10, 0)) for needs in ("sm_80", "sm_90", "sm_90a")] == [True, True, False]
    assert target((9, 0)) == "90a"
    assert target((8, 9)) == "89"


def test_headers_say_what_hardware_has_confirmed():
    for header in ("bulk.cuh", "wgmma.cuh"):
        unverified = "unverified on hardware" in (CORE / header).read_text()
        assert unverified != golden.PATH.exists(), f"{header}: golden.json and the header comment disagree"


if golden.PATH.exists():
    GOLDEN = golden.Golden()

    @pytest.mark.parametrize("case", [case for case in CASES if case.name in GOLDEN.names()], ids=str)
    def test_emulator_and_hardware_agree(case):
        GOLDEN.check(case, case.run(emulated()))
