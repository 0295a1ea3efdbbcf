"""The `quantization_config` of a config.json: which layers of a checkpoint are quantized, and how.

    {"quant_method": "warpformer",
     "groups": [{"format": "int4", "group_size": 128, "zero_points": false, "layers": ["layers.0.qkv", ...]}]}

group_size -1 is one group a row.
"""

import torch
from torch import nn

from warpformer._C import InputError
from warpformer.models._config import CheckpointError
from warpformer.nn import (
    FusedLinear,
    GroupedLinear,
    Int4Linear,
    Int8Linear,
    Linear,
    QuantizedGroupedLinear,
)
from warpformer.nn.quantized_linear import QuantizedLinear
from warpformer.ops._quantized import FORMATS, INT8_FORMATS

METHOD = "warpformer"
FIELDS = {"format": str, "group_size": int, "zero_points": bool, "layers": list}


def quantization_config(model: nn.Module) -> dict | None:
    """That of a model; None if none of its layers is quantized."""
    groups = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            size = -1 if layer.group_size == layer.in_features else layer.group_size
            groups.setdefault((layer.format, size, layer.zero_points), []).append(name)
    if not groups:
        return None
    return {
        "quant_method": METHOD,
        "groups": [dict(zip(FIELDS, (*key, names), strict=True)) for key, names in groups.items()],
    }


def prepare_model(model: nn.Module, config) -> None:
    """Puts empty quantized layers where `config`, from outside, has them, on the meta device.

    Raises:
        CheckpointError: a field is missing or not what it must be, or names what is no linear layer.
    """
    for group in _read_groups(config):
        for name in group["layers"]:
            layer = dict(model.named_modules()).get(name) if type(name) is str else None
            if type(layer) not in (Linear, FusedLinear, GroupedLinear):
                raise CheckpointError(
                    f"config.json: quantization_config has the layer {name!r:.80}, which is no linear layer"
                )
            model.set_submodule(name, _empty_layer(layer, group))


def _read_groups(config):
    method = config.get("quant_method") if type(config) is dict else None
    if method != METHOD:
        raise CheckpointError(f"config.json: quant_method = {method!r:.80} is not {METHOD!r}")
    groups = config.get("groups")
    if type(groups) is not list or not all(type(group) is dict for group in groups):
        raise CheckpointError("config.json: quantization_config has no list of groups")
    for group in groups:
        for field, kind in FIELDS.items():
            value = group.get(field)
            if type(value) is not kind:
                raise CheckpointError(
                    f"config.json: quantization_config: {field} = {value!r:.80} is no {kind.__name__}"
                )
        if group["format"] not in FORMATS:
            raise CheckpointError(
                f"config.json: quantization_config: format = {group['format']!r:.80} is none of {FORMATS}"
            )
    return groups


def _empty_layer(layer, group):
    arguments = layer.in_features, layer.out_features, layer.bias is not None, torch.device("meta")
    options = {field: group[field] for field in ("format", "group_size", "zero_points")}
    options |= {key: getattr(layer, key) for key in ("parts", "gated") if hasattr(layer, key)}
    try:
        is_int8 = group["format"] in INT8_FORMATS
        if is_int8 and group["zero_points"]:
            raise InputError(f"zero_points: {group['format']} is symmetric")
        if isinstance(layer, GroupedLinear):
            return QuantizedGroupedLinear(layer.num_experts, *arguments, **options)
        if is_int8:
            del options["zero_points"]
            return Int8Linear(*arguments, **options)
        return Int4Linear(*arguments, **options)
    except InputError as error:
        raise CheckpointError(f"config.json: quantization_config: {error}") from error
