"""Packs of parameters that are not trained at the moment, kept from call to call."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_packs = WeakIdKeyDictionary()  # parameter -> {what of it is packed, and how: _Pack}


class _Pack:
    def __init__(self, weight, data):
        self.memory = weight.detach()  # which nothing else can take the place of while it is held
        self.version = weight._version
        self.data = data

    def is_of(self, weight):
        return self.memory.data_ptr() == weight.data_ptr() and self.version == weight._version


def kept(weight: Tensor, key: tuple, pack: Callable[[], Tensor]) -> Tensor:
    """`pack()`, or what it gave when `weight` was last asked for by this key and had the values it has now.

    Nothing is kept for a tensor that is no parameter (it may be gone after this call), nor for one made in
    inference mode (its changes are not counted).
    """
    if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():
        return pack()
    packs = _packs.setdefault(weight, {})
    found = packs.get(key)
    if found is None or not found.is_of(weight):
        found = packs[key] = _Pack(weight, pack())
    return found.data


def drop_packs(weight: Tensor):
    """Forgets the packs of a parameter."""
    _packs.pop(weight, None)
