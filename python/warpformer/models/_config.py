"""Reading config.json, which comes from outside: every field is checked before anything is built of it."""

from dataclasses import MISSING, fields

LARGEST = 2**24  # of any size in a config: beyond every model, below every overflow


class CheckpointError(ValueError):
    """A checkpoint's files do not describe a model that can be built."""


def read_config(cls, values):
    """A `cls` of the `values` it has fields for; others are ignored. Integers must be in 1..LARGEST."""
    chosen = {}
    for field in fields(cls):
        if field.name not in values:
            if field.default is MISSING:
                raise CheckpointError(f"config.json has no {field.name}")
            continue
        value = values[field.name]
        if field.type is float and type(value) is int:
            value = float(value)
        if type(value) is not field.type:
            raise CheckpointError(
                f"config.json: {field.name} = {value!r:.80} is not of type {field.type.__name__}"
            )
        if field.type is int and not 1 <= value <= LARGEST:
            raise CheckpointError(f"config.json: {field.name} = {value} is not in 1..{LARGEST}")
        chosen[field.name] = value
    return cls(**chosen)


def require(condition, message):
    if not condition:
        raise CheckpointError(f"config.json: {message}")
