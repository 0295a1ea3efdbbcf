"""Layers whose rows are those of several layers of a checkpoint, one below the other."""

from collections.abc import Mapping

from torch import Tensor

WHOLE = ""  # the name of a part that is all of its layer


def part_keys(parts: Mapping[str, int], kind: str) -> list[str]:
    """Of each part its key of the state_dict for `kind`: "weight", "bias"."""
    return [f"{part}.{kind}" if part else kind for part in parts]


def split_parts(parts: Mapping[str, int], kind: str, rows: Tensor) -> dict[str, Tensor]:
    """Key of each part -> its rows."""
    pieces = rows.split([*parts.values()]) if len(parts) > 1 else [rows]
    return dict(zip(part_keys(parts, kind), pieces, strict=True))
