"""Where other libraries call warpformer. None of them is imported until the user does."""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_HOST = "transformers.modeling_utils"  # the module that has transformers' table of attention functions


class _AfterImport(MetaPathFinder):
    """Registers attn_implementation="warpformer" as soon as transformers can take it: after its own import
    of `_HOST`, which this finder sees pass, once."""

    def find_spec(self, name, path=None, target=None):
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def _register():
    from warpformer.integrations.transformers import register

    register()


def register_with_transformers():
    """Makes attn_implementation="warpformer" known: now if transformers is loaded, else when it will be."""
    if _HOST in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
