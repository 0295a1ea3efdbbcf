"""The house of CONTRIBUTING: what may import what, and what every op comes with."""

import ast
import re
from pathlib import Path

import pytest

from warpformer import ops

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python/warpformer"
LEVELS = (
    "_C",
    "ops",
    "nn",
    "quantization generation models integrations",
    "gguf checkpoint load save patch embeddings translator chat scoring training compression",
    "cli",
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
OPS = re.search(r"set\(OPS ([^)]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
PYTHON_OPS = sorted(p.stem for p in (PACKAGE / "ops").glob("[!_]*.py"))
SOURCES = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
C_HEADERS = {"immintrin.h", "math.h", "omp.h", "sched.h", "stddef.h", "stdint.h", "cstdint", "string.h"}


def part(name):
    """`ops` of `warpformer.ops.softmax`."""
    return name.split(".")[1] if name.startswith("warpformer.") else None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (part(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield part(node.module)
            yield from (alias.name for alias in node.names if node.module == "warpformer")


def includes(path):
    return re.findall(r'^#\s*include\s+(["<])([^">]+)', path.read_text(), re.M)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*/*.py")) + sorted(PACKAGE.glob("[!_]*.py")), ids=str)
def test_python_imports_point_down(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {name for name in imports(path) if name in LEVEL}
    assert {name for name in used if LEVEL[name] > LEVEL.get(own, len(LEVELS))} == set()


def test_includes_point_down():
    for path in SOURCES:
        own = path.relative_to(ROOT / "csrc").parts[0]
        allowed = {"core"} if own in ("core", "module.cpp") else {"core", own}
        for quote, name in includes(path):
            if quote == '"' and name != "ops.inc" and (ROOT / "csrc" / name).exists():
                assert name.split("/")[0] in allowed, f"{path} includes {name}"


def test_kernels_include_no_cpp_headers():
    """Their inline functions would be compiled for every ISA, and the linker would keep any copy."""
    todo, seen = list((ROOT / "csrc").glob("*/cpu*.cpp")), set()
    while todo:
        path = todo.pop()
        for quote, name in includes(path):
            assert quote == '"' or name in C_HEADERS, f"{path} includes <{name}>"
            if quote == '"' and name not in seen:
                seen.add(name)
                todo.append(ROOT / "csrc" / name)
    assert "core/simd.h" in seen


def test_check_is_in_op_cpp_only():
    for path in SOURCES:
        if path.name not in ("op.cpp", "check.h", "run.h"):
            assert not re.search(r"^\s*CHECK\w*\(", path.read_text(), re.M), path


@pytest.mark.parametrize("op", OPS)
def test_an_op_folder_is_complete(op):
    assert {"op.h", "op.cpp", "cpu.cpp"} <= {p.name for p in (ROOT / "csrc" / op).iterdir()}


@pytest.mark.parametrize("op", PYTHON_OPS)
def test_a_python_op_is_complete(op):
    assert (ROOT / "tests/ops" / f"test_{op}.py").exists()
    assert (ROOT / "bench" / f"{op}.py").exists()
    contract = getattr(ops, op).__doc__
    assert all(f"{word}:" in contract for word in ("Args", "Returns", "Raises", "Source"))


def test_every_function_has_a_docstring():
    assert {op for op in PYTHON_OPS} <= set(ops.__all__)
    assert [name for name in ops.__all__ if not getattr(ops, name).__doc__] == []


def test_files_are_short():
    files = SOURCES + [p for folder in ("python", "tests", "bench") for p in (ROOT / folder).rglob("*.py")]
    assert [str(p) for p in files if len(p.read_text().splitlines()) > 600] == []
