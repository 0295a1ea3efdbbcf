"""Rules for kernels, which let tests/emulator run and check every line of them on the CPU."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRIMITIVES = sorted((ROOT / "csrc/core/cuda").glob("*.cuh"))
KERNELS = sorted(p for p in (ROOT / "csrc").glob("*/cuda*.cu*")) + sorted(
    (ROOT / "tests").glob("*/*_kernels.cu")
)
COLLECTIVES = (
    r"(?:shuffle\w*|ballot|any|all|elect|sync_warp|sync_block\w*|barrier_sync|barrier_arrive|(?:warp|block|team)_\w+"
    r"|ldmatrix\w*|stmatrix\w*|mma_\w+|wgmma\w*)"
)
NOT_A_COLLECTIVE = r"(?!warp_index|block_index|block_threads|team_size|team_threads|team_blocks|team_index)"

FORBIDDEN = {
    "asm is for the primitives of core/cuda": r"\basm\b",
    "launch with LAUNCH": r"<<<|\bcudaLaunch",
    "a primitive of core/cuda, not CUDA's own": r"\b__(?!builtin_)\w+|\batomic[A-Z]\w*"
    r"|\b(?:thread|block)Idx\b|\b(?:block|grid)Dim\b|\bcuda[A-Z]\w*\s*\(|\bcu[A-Z]\w*\s*\(",
    "no library of device code": r"#\s*include\s*<(?:cooperative_groups|cub|cuda|cute|cutlass|thrust|mma)\b",
    "wait with spin_until": r"\bwhile\s*\(.*\b(?:load\w*|atomic_\w+)\s*\(|\bvolatile\b",
    "sums have one order: no atomic additions of floats": r"\bred_add2?\s*\(",
    "one collective a line: its line is how the emulator knows it": (
        rf"\b{NOT_A_COLLECTIVE}{COLLECTIVES}(?:<[^<>]*>)?\(.*\b{NOT_A_COLLECTIVE}{COLLECTIVES}(?:<[^<>]*>)?\("
    ),
}


def code(text):
    """The lines of a source without comments and strings."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
    return [re.sub(r'"(?:\\.|[^"\\])*"', '""', line).split("//")[0] for line in text.splitlines()]


def violations(text):
    return [
        f"line {number}: {rule}: {line.strip()}"
        for number, line in enumerate(code(text), 1)
        for rule, pattern in FORBIDDEN.items()
        if re.search(pattern, line)
    ]


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_keep_the_rules(path):
    found = violations(path.read_text())
    if path.is_relative_to(ROOT / "tests"):  # they are there to break rules, and to test every primitive
        found = [line for line in found if not re.search("spin_until|atomic additions", line)]
    assert found == []


def test_shared_memory_is_dynamic():
    """Static arrays would lie where the emulator cannot watch them."""
    declarations = [line for path in PRIMITIVES for line in code(path.read_text()) if "__shared__" in line]
    assert len(declarations) == 1
    assert "extern" in declarations[0]


@pytest.mark.parametrize(
    "line",
    [
        'asm("nop;");',
        "kernel<<<1, 32>>>(x);",
        "__shared__ float s[32];",
        "x += __shfl_xor_sync(~0u, x, 1);",
        "__syncthreads();",
        "atomicAdd(p, 1);",
        "const int t = threadIdx.x;",
        "cudaMemsetAsync(p, 0, 4, stream);",
        "#include <cooperative_groups.h>",
        "#include <cub/cub.cuh>",
        "while (load(flag) == 0) {}",
        "while (atomic_add(flag, 0) != n) {",
        "volatile int* flag = p;",
        "red_add(sum, x);",
        "x = lane ? shuffle(x, 0) : shuffle(x, 1);",
        "store(p, warp_sum(x) / block_max(y, s));",
        "x = shuffle_xor<float>(shuffle_xor(x, 1), 2);",
    ],
)
def test_a_rule_catches(line):
    assert len(violations(line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "for (int i = 0; i < n; ++i) sum += load(p + i);",
        "x += shuffle_xor(x, 16);  // not __shfl_xor_sync, nor shuffle(shuffle(x))",
        "const int t = warp_index() * 32 + block_threads() - block_index();",
        "const float inf = __builtin_inff();",
        "atomic_add(counter, 1);",
        'throw std::runtime_error("asm");',
    ],
)
def test_a_rule_lets_pass(line):
    assert violations(line) == []
