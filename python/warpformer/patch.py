"""Layers of live models on our kernels: a swap of classes, which leaves all else of a module as it is."""

import sys
from collections import Counter
from functools import cache
from types import FunctionType
from typing import NamedTuple

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from warpformer._C import InputError
from warpformer.nn import MultiheadAttention, _activations
from warpformer.nn._drop_in import DROP_INS
from warpformer.nn._packed import PackedModule
from warpformer.nn._repack import Repacking
from warpformer.ops._quantized import FLOATS
from warpformer.quantization.quantize_ import leave_fast_path

_ORIGINAL = "_unpatched_class"  # the attribute of a swapped module that says what it was
_IMMATERIAL = {"__init__", "__setstate__", "extra_repr", "reset_parameters", "_reset_parameters"}


class Change(NamedTuple):
    """What `patch_` did to one part of a model."""

    name: str  # of the module in the model
    before: str  # what it was
    after: str  # what it is; empty where it was left alone
    reason: str = ""  # why it was left alone


class Report(list[Change]):
    """What `patch_` did, part by part. As a string: how many of each kind."""

    def __str__(self):
        kinds = Counter((c.before, c.after or f"left alone: {c.reason}") for c in self)
        width = max((len(before) for before, _ in kinds), default=0)
        lines = [f"{n:4d} x {before:{width}} -> {after}" for (before, after), n in kinds.items()]
        return "\n".join(lines) or "nothing to patch"


def patch_(model: nn.Module) -> Report:
    """Has the layers of a model compute on our kernels, in place; `unpatch_` undoes it.

    Layers of torch.nn become those of `wf.nn`. In models of Hugging Face transformers also attention (by
    attn_implementation="warpformer"), RMSNorms, activation functions, gated and plain MLPs, GPT-2's Conv1D
    and the language modelling losses become ours. What a module does not share with torch's or transformers'
    own stays as it is, as do parametrized ones and those whose forward was replaced.

    A module keeps its parameters, buffers, attributes, hooks, name, place and training mode, and stays an
    instance of its class: only `__class__` changes, to a subclass. Optimizers, state_dicts, deep copies and
    `save_pretrained` go on as before; `quantize_` takes patched layers. A second call changes nothing. While
    they do not train, linear layers keep their weights packed, too, in as much memory again.

    Args:
        model: any module, one of transformers or sentence-transformers, too.

    Returns:
        A Change for each part that became ours, or that was left alone though its like is ours.
    """
    report = Report()
    hugging_face = _hugging_face()
    for name, module in model.named_modules():
        before = type(module)
        ours, reason = _replacement(module, hugging_face)
        if ours and not reason:
            vars(module)[_ORIGINAL] = before
            module.__class__ = _swapped(ours, before)
        if ours:
            report.append(Change(name, _path(before), "" if reason else _path(ours), reason))
        if hugging_face:
            report += [Change(name, *change) for change in hugging_face.patch_model(module)]
    return report


def unpatch_(model: nn.Module) -> None:
    """Undoes `patch_`: every module is of the class it was; what its parameters learned stays.

    Layers that were quantized in between stay so.

    Raises:
        InputError: a MultiheadAttention has quantized projections, whose weights torch's would read. Nothing
            is undone then.
    """
    for name, module in model.named_modules():
        if _ORIGINAL in vars(module) and _has_quantized_projections(module):
            raise InputError(
                f"{name or 'the model'}: torch.nn.MultiheadAttention has no quantized projections"
            )
    hugging_face = _hugging_face()
    for module in model.modules():
        if original := vars(module).pop(_ORIGINAL, None):
            module.__class__ = original
            leave_fast_path(module)
        if hugging_face:
            hugging_face.unpatch_model(module)


def _has_quantized_projections(module):
    layers = (getattr(module, "in_proj", None), getattr(module, "out_proj", None))
    return isinstance(module, MultiheadAttention) and any(isinstance(layer, PackedModule) for layer in layers)


def _replacement(module, hugging_face):
    """Our class for a module, or None; and why it cannot be of that class, or nothing."""
    cls = type(module)
    if _ORIGINAL in vars(module) or issubclass(cls, tuple(DROP_INS.values())):
        return None, ""
    for base in cls.__mro__:
        if ours := DROP_INS.get(base):
            return ours, _obstacle(module, ours) or _difference(cls, base)
    ours = _activations.of_torch(module)
    if ours is None and hugging_face:
        ours = hugging_face.replacement(module)
    return ours, _obstacle(module, ours) if ours else ""


def _obstacle(module, ours):
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, LazyModuleMixin):
        return "it has no parameters before its first call"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    parameters = list(module.parameters())
    if others := {p.dtype for p in parameters} - set(FLOATS):
        return f"its parameters are {others.pop()}"
    if issubclass(ours, Repacking) and (others := {p.device.type for p in parameters} - {"cpu", "meta"}):
        return f"on {others.pop()}: ours is of the CPU"
    return ""


def _difference(cls, base):
    """The first method of a class that a class derived from it has anew."""
    derived = cls.__mro__[: cls.__mro__.index(base)]
    methods = [name for name, value in vars(base).items() if isinstance(value, FunctionType)]
    changed = [name for name in methods if name not in _IMMATERIAL and any(name in vars(c) for c in derived)]
    return f"its class has its own {changed[0]}" if changed else ""


@cache
def _swapped(ours: type, theirs: type) -> type:
    """`ours`, which computes what `theirs` does, as a subclass of `theirs`."""
    if issubclass(ours, theirs):
        return ours
    return type(theirs.__name__, (_Pickling, ours, theirs), {"__module__": theirs.__module__})


class _Pickling:
    """Classes that `_swapped` made have no name to be found by: they are made again."""

    def __reduce_ex__(self, protocol):
        _, ours, theirs = type(self).__bases__
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, (ours, theirs), *state


def _new(ours, theirs):
    cls = _swapped(ours, theirs)
    return cls.__new__(cls)


def _path(cls):
    root, *parts = cls.__module__.split(".")
    return f"{root}.nn.{cls.__name__}" if parts[:1] == ["nn"] else f"{root} {cls.__name__}"


def _hugging_face():
    """What there is to models of transformers; None where it was not imported, so that there can be none."""
    if "transformers.modeling_utils" not in sys.modules:
        return None
    from warpformer.integrations import transformers_model

    return transformers_model
