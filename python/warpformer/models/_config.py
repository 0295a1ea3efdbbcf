"""Reading config.json, which comes from outside: every field is checked before anything is built of it."""

from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import get_args

LARGEST = 2**24  # of any size in a config: beyond every model, below every overflow
LAYERS = 1024
OR_ZERO = {"zero": "allowed"}


class CheckpointError(ValueError):
    """A checkpoint's files do not describe a model that can be built."""


@dataclass(kw_only=True)
class Labels:
    """The fields of config.json for heads that classify."""

    id2label: dict | None = None
    num_labels: int | None = None

    def __post_init__(self):
        if self.num_labels is None:
            self.num_labels = len(self.id2label) if self.id2label else 2


def read_config(cls, values):
    """A `cls` of the `values` it has fields for; others are ignored. Integers must be in 1..LARGEST, or in
    0..LARGEST where a field's default is 0 or its metadata is OR_ZERO; a null, where a field
    cannot be None, is one that is not there."""
    chosen = {}
    for field in fields(cls):
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        value = values.get(field.name)
        if value is None:
            if field.default is MISSING:
                raise CheckpointError(f"config.json has no {field.name}")
            if field.name in values and type(None) in kinds:
                chosen[field.name] = None
            continue
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise CheckpointError(f"config.json: {field.name} = {value!r:.80} is not of type {names}")
        least = 0 if field.default == 0 or field.metadata == OR_ZERO else 1
        if type(value) is int and not least <= value <= LARGEST:
            raise CheckpointError(f"config.json: {field.name} = {value} is not in {least}..{LARGEST}")
        if type(value) is float and not abs(value) < float("inf"):
            raise CheckpointError(f"config.json: {field.name} = {value} is not finite")
        chosen[field.name] = value
    return cls(**chosen)


def require(condition, message):
    if not condition:
        raise CheckpointError(f"config.json: {message}")


def require_layers(**counts: int):
    for name, count in counts.items():
        require(count <= LAYERS, f"{name} = {count} is over {LAYERS}")


def require_multiple(**sizes: int):
    """require_multiple(a=6, b=3): that the first is a multiple of the second."""
    (whole, n), (part, d) = sizes.items()
    require(n % d == 0, f"{whole} = {n} is no multiple of {part} = {d}")


ACTIVATIONS = {  # as config.json names them -> as ops.activation does
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}


def activation_of(field: str, name: str) -> str:
    require(name in ACTIVATIONS, f"{field} = {name!r:.80} is none of {[*ACTIVATIONS]}")
    return ACTIVATIONS[name]
