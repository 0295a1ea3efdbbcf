import math

import pytest
import torch

from warpformer import _C
from warpformer.bench import roofline


@pytest.fixture(scope="module")
def limits():
    return {(r["limit"], r["isa"], r["threads"]): r["giga_per_s"] for r in roofline.limits(2)}


def test_every_limit_is_positive_and_finite(limits):
    assert all(0 < value < math.inf for value in limits.values())


def test_every_isa_has_f32_and_the_one_in_use_has_bandwidth(limits):
    isas = roofline.ISAS[: roofline.ISAS.index(_C.best_isa()) + 1]
    assert {isa for limit, isa, _ in limits if limit == "f32"} == set(isas)
    assert {(limit, isa) for limit, isa, _ in limits if limit in roofline.MEMORY} == {
        (limit, _C.isa()) for limit in roofline.MEMORY
    }
    assert {isa for limit, isa, _ in limits if limit == "bf16"} <= {"avx512_bf16"}


@pytest.mark.parametrize(
    ("limit", "isa", "lower_isa"), [("f32", "avx2", "scalar"), ("int8", "avx512_vnni", "avx512")]
)
def test_better_instructions_do_more(limits, limit, isa, lower_isa):
    """At least twice as much on every CPU that has them; a busy machine takes its part."""
    if isa in roofline.ISAS[: roofline.ISAS.index(_C.best_isa()) + 1]:
        assert limits[limit, isa, 1] > 1.3 * limits[limit, lower_isa, 1]


def test_isa_is_restored():
    before = _C.isa()
    with roofline.isa("scalar"):
        assert _C.isa() == "scalar"
    assert _C.isa() == before


def test_binding_limit_follows_the_intensity():
    assert roofline.binding(1 << 20, 1, "f32", 1) == (
        max(roofline.MEMORY, key=lambda limit: roofline.best_rate(limit, 1)),
        1 << 20,
    )
    assert roofline.binding(1, 1 << 20, "f32", 1) == ("f32", 1 << 20)
    assert roofline.binding(1, 1 << 20, "int8", 1)[0] in ("int8", "f32")
    with roofline.isa("scalar"):  # which has no bf16 instruction
        assert roofline.binding(1, 1 << 20, "bf16", 1) == ("f32", 1 << 20)


def test_memory_is_past_the_cache_and_no_page_is_like_another():
    assert roofline.past_cache() >= 4 * roofline.last_level_cache()
    memory = roofline._memory()
    assert memory.numel() >= roofline.past_cache()
    starts = memory.view(torch.int64)[::512]  # of pages of 4 KB
    assert len(starts.unique()) == len(starts)
