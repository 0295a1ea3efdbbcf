"""Fused Transformer kernels for CPUs and CUDA GPUs, drop-in for PyTorch."""

import torch  # noqa: F401  first: the kernels run on the OpenMP threads that it loads

from warpformer import ops
from warpformer._C import InputError, __version__

__all__ = ["InputError", "__version__", "ops"]
