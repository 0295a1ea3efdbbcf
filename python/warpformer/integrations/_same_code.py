from functools import cache
from inspect import unwrap
from types import CodeType, FunctionType

_IMMATERIAL = {"__init__", "extra_repr", "__repr__"}


@cache
def has_code_of(cls: type, original: type) -> bool:
    """Whether the methods of `original`, construction aside, are compiled to the same code in `cls`."""
    methods = {name: f for name, f in _functions(vars(original)).items() if name not in _IMMATERIAL}
    return "forward" in methods and all(
        _is_same(f, _functions({name: getattr(cls, name, None)}).get(name)) for name, f in methods.items()
    )


def _functions(namespace):
    """Those of a class, without decorators."""
    found = {name: getattr(f, "__func__", f) for name, f in namespace.items()}
    return {name: unwrap(f) for name, f in found.items() if isinstance(f, FunctionType)}


def _is_same(f, g):
    if f is None or g is None or _essence(f.__code__, f.__doc__) != _essence(g.__code__, g.__doc__):
        return False
    return all(_is_same_global(f.__globals__.get(n), g.__globals__.get(n)) for n in f.__code__.co_names)


def _is_same_global(f, g):
    return f is g or (isinstance(f, FunctionType) and isinstance(g, FunctionType) and _is_same(f, g))


def _essence(code, doc=None):
    """What a function does, but for the globals that it names: no docstring, no line numbers."""
    constants = [None if doc is not None and c is doc else c for c in code.co_consts]
    constants = [_essence(c) if isinstance(c, CodeType) else c for c in constants]
    return code.co_code, code.co_names, code.co_varnames, constants
