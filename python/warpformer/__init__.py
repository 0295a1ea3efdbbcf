"""Fused Transformer kernels for CPUs and CUDA GPUs, drop-in for PyTorch."""

import torch

from warpformer import nn, ops, quantization, training
from warpformer._C import InputError, __version__
from warpformer.chat import ChatTemplate
from warpformer.embeddings import SentenceEncoder
from warpformer.generation import (
    Constraint,
    Engine,
    Finished,
    Generated,
    GenerationConfig,
    Prefix,
    Request,
    TextStreamer,
    generate,
)
from warpformer.integrations import register_with_transformers
from warpformer.load import load
from warpformer.models._config import CheckpointError
from warpformer.nn import repack_
from warpformer.patch import patch_, unpatch_
from warpformer.quantization import quantize_
from warpformer.save import save
from warpformer.scoring import Score, score
from warpformer.translator import Translator

__all__ = [
    "ChatTemplate",
    "CheckpointError",
    "Constraint",
    "Engine",
    "Finished",
    "Generated",
    "GenerationConfig",
    "InputError",
    "Prefix",
    "Request",
    "Score",
    "SentenceEncoder",
    "TextStreamer",
    "Translator",
    "__version__",
    "generate",
    "info",
    "load",
    "nn",
    "ops",
    "patch_",
    "quantization",
    "quantize_",
    "repack_",
    "save",
    "score",
    "training",
    "unpatch_",
]

register_with_transformers()


def info() -> dict[str, object]:
    """What runs here: versions, ISA, threads, the CUDA this was built with and the one the driver serves."""
    from warpformer import _C

    return {
        "warpformer": __version__,
        "torch": torch.__version__,
        "isa": _C.isa(),
        "best_isa": _C.best_isa(),
        "threads": torch.get_num_threads(),
        "cuda": cuda_version(_C.cuda_runtime_version()),
        "cuda_architectures": _C.cuda_architectures or None,
        "cuda_driver": cuda_version(_C.cuda_driver_version()),
    }


def cuda_version(number: int) -> str | None:
    return f"{number // 1000}.{number % 1000 // 10}" if number else None
