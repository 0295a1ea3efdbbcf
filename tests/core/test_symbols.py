"""No code for one CPU where another may run it: the object files, not the promises."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ISAS

ROOT = Path(__file__).parents[2]


def objects(target):
    """The object files of a CMake target, in the build folder that `make test` leaves."""
    build = Path(os.environ.get("WARPFORMER_BUILD", ROOT / "build"))
    found = sorted(build.rglob(f"CMakeFiles/{target}.dir/**/*.o"))
    assert found, (
        f"no objects of {target} in {build}: build with `pip install --no-build-isolation "
        "-Cbuild-dir=build -e .`, or set WARPFORMER_BUILD to a build folder"
    )
    return found


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("isa", ISAS)
def test_what_an_isa_defines_is_in_its_namespace(isa):
    """The linker keeps one copy of a weak symbol, whichever: one outside could come from AVX-512 code."""
    lines = output("nm", "--defined-only", "--format=posix", *objects(f"cpu_{isa}")).splitlines()
    symbols = [line.split()[:2] for line in lines if not line.endswith(":")]
    shared = {name for name, kind in symbols if kind.isupper() or kind in "vwu"}
    shared.discard("DW.ref.__gxx_personality_v0")  # the address of a function of libstdc++: no code
    inside = {name for name in shared if re.match(rf"_ZZ?NK?10warpformer3cpu{len(isa)}{isa}\d", name)}
    assert shared - inside == set()
    assert len(inside) >= len(ISAS)


VEX = r"\tv\w+ +.*%[xyz]mm"
MASK_OR_UPPER = r"%k[0-7]|%zmm|%[xy]mm(1[6-9]|2\d|3[01])"
FORBIDDEN = {  # instructions of a better ISA
    "_C": VEX,
    "cpu_scalar": VEX,
    "cpu_avx2": MASK_OR_UPPER,
    "cpu_avx512": r"\tvpdp|\tvdpbf16|\tvcvtne",
    "cpu_avx512_vnni": r"\tvdpbf16|\tvcvtne",
}


@pytest.mark.parametrize("target", FORBIDDEN)
def test_instructions(target):
    code = output("objdump", "--disassemble", "--no-show-raw-insn", *objects(target))
    assert code.count("\n") > 1000
    assert [line for line in code.splitlines() if re.search(FORBIDDEN[target], line)] == []
