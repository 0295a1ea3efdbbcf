"""Where other libraries call warpformer. None of them is imported until the user does it."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_HOST = "transformers.modeling_utils"  # holds transformers' table of attention functions
_GUEST = "warpformer.integrations.transformers"  # enters ours there when it is imported


class _ImportAfterHost(MetaPathFinder):
    """Sees the import of `_HOST` pass, once, and has that of `_GUEST` follow it."""

    def find_spec(self, name, path=None, target=None):
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                import_module(_GUEST)

            spec.loader.exec_module = exec_module
        return spec


def register_with_transformers():
    """Makes attn_implementation="warpformer" known to transformers: as soon as that is imported."""
    if _HOST in sys.modules:
        import_module(_GUEST)
    else:
        sys.meta_path.insert(0, _ImportAfterHost())
