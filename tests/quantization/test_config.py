"""The quantization_config of a checkpoint comes from outside; tests/test_save.py has what it says in one."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import nn

import warpformer as wf
from warpformer.nn.quantized_linear import QuantizedLinear
from warpformer.ops._quantized import FORMATS
from warpformer.quantization.config import prepare_model, quantization_config

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=5
)
NAMES = st.lists(st.sampled_from(["first", "block.0", "norm", "block", "", "block.7"]) | JSON, max_size=3)
GROUP = st.fixed_dictionaries(
    {},
    optional={
        "format": st.sampled_from(FORMATS) | JSON,
        "group_size": st.sampled_from([-1, 32, 48]) | JSON,
        "zero_points": st.booleans() | JSON,
        "layers": NAMES | JSON,
    },
)
CONFIG = st.fixed_dictionaries(
    {"quant_method": st.just("warpformer"), "groups": st.lists(GROUP, max_size=3) | JSON}
)


def network():
    with torch.device("meta"):
        return nn.ModuleDict(
            {
                "first": wf.nn.FusedLinear(48, {"a": 2, "b": 4}),
                "block": nn.Sequential(wf.nn.Linear(40, 5, bias=False)),
            }
            | {"norm": wf.nn.LayerNorm(5)}
        )


@given(CONFIG | JSON)
@settings(max_examples=300, deadline=None)
@example(
    {
        "quant_method": "warpformer",
        "groups": [{"format": "int4", "group_size": 10**40, "zero_points": False, "layers": ["first"]}],
    }
)
def test_any_config(config):
    model = network()
    try:
        prepare_model(model, config)
    except wf.CheckpointError:
        return
    named = {name for group in config["groups"] for name in group["layers"]}
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert quantized == named


@pytest.mark.parametrize("group_size", [-1, 32])
def test_round_trip(group_size):
    model, other = network(), network()
    groups = [
        {"format": "int4", "group_size": group_size, "zero_points": True, "layers": ["first"]},
        {"format": "int8_dynamic", "group_size": -1, "zero_points": False, "layers": ["block.0"]},
    ]
    prepare_model(model, {"quant_method": "warpformer", "groups": groups})
    config = quantization_config(model)
    assert config["groups"] == groups
    prepare_model(other, config)
    assert repr(other) == repr(model)
    for name in ("first", "block.0"):
        layer, again = model.get_submodule(name), other.get_submodule(name)
        assert layer.state_layout() == again.state_layout()
    assert quantization_config(network()) is None
