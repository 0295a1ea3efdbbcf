"""Arguments of the wrong type, refused by the name that they have in the op."""

import re
import sys
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from warpformer._C import InputError

# What torch's dispatcher says of an argument that is not of the type in the schema.
_MISFIT = re.compile(
    r"Expected a value of type '(.+)' for argument '(\w+)' but instead found type '(\w+)'\.\s*"
    r"Position: \d+\s*Value: (.*)"
)


def refuse_tensor(value):
    """Raises TypeError for what the op that called is_direct was given in place of a tensor."""
    caller = sys._getframe(2)
    arguments = caller.f_locals.items()

    def holding(kind):
        parts = [(name, parts) for name, parts in arguments if isinstance(parts, kind)]
        return [name for name, each in parts if any(part is value for part in each)]

    names = holding(list) + [name for name, argument in arguments if argument is value] + holding(tuple)
    _refuse(caller.f_code.co_name, names[0], "a torch.Tensor", value)


def require_tensor(name, value):
    """Raises TypeError for what is no tensor, under the name that it has in a layer."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")


def check_flags(op, **flags):
    """Raises TypeError for what is no bool, where Python itself asks whether it is true: a tensor has an
    answer of its own, or none."""
    for name, value in flags.items():
        if value is not True and value is not False and not isinstance(value, torch.SymBool | np.bool_):
            _refuse(op, name, "a bool", value)


def check_number(op, name, value):
    """Raises TypeError for what is no number."""
    if type(value) is not float and not isinstance(value, Real | torch.SymInt | torch.SymFloat):
        _refuse(op, name, "a number", value)


def check_integer(op, name, value):
    """Raises TypeError for what is no integer, and InputError for one beyond those of kernels."""
    if type(value) is not int and not isinstance(value, Integral | torch.SymInt):
        _refuse(op, name, "an int", value)
    if not -(2**63) <= value < 2**63:
        raise InputError(f"{op}: {name} = {value} is not an int64")


def check_integers(op, name, values):
    """The list of integers that it is; what is none raises TypeError."""
    values = list(values)
    for value in values:
        check_integer(op, name, value)
    return values


def check_type(op, name, value, kind):
    """Raises TypeError for what is not of type `kind`, nor None."""
    if value is not None and not isinstance(value, kind):
        _refuse(op, name, f"a {kind.__name__}", value)


def check_pair(op, name, values, *, optional=False):
    """The pair of integers (or None, where `optional`) that it is; what is none raises TypeError."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        _refuse(op, name, "a pair of ints", values)
    for value in values:
        if value is not None or not optional:
            check_integer(op, name, value)
    return values


def _refuse(op, name, kind, value):
    raise TypeError(f"{op}: {name} must be {kind}, not {type(value).__name__}")


def refuse_by_schema(op, args, error):
    """Raises by name what torch's dispatcher could not pass on, or nothing if `error` has other reasons."""
    for argument, value in zip(op._schema.arguments, args, strict=False):
        for t in tree_leaves(value):
            if isinstance(t, Tensor) and "Tensor" not in str(argument.type):
                _refuse(_name(op), argument.name, f"of type {argument.type}", t)
            if isinstance(t, Tensor) and (t.layout is not torch.strided or t.is_nested or t.is_quantized):
                kind = "nested" if t.is_nested else f"{list(t.shape)}, {t.dtype}, {t.layout}"
                raise InputError(f"{_name(op)}: {argument.name} = {kind} is no plain tensor") from error
    if (found := _MISFIT.search(str(error))) is not None:
        kind, name, given, value = found.groups()
        raise TypeError(f"{_name(op)}: {name} = {value:.80} ({given}) is no {kind}") from error


def _name(op):
    return op._schema.name.split("::")[1].removesuffix("_out")
