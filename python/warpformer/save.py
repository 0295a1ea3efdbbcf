"""From a model to a checkpoint that `warpformer.load` reads."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from warpformer.quantization.config import quantization_config


def save(model: nn.Module, folder) -> None:
    """Writes config.json and model.safetensors, quantized layers as they are.

    Tensors have the names that transformers gives them, which also reads the checkpoint if nothing in it is
    quantized.

    Args:
        model: what `warpformer.load` returned, quantized or not.
        folder: where to; made if it is not there. Each file takes its name when it is whole.

    Raises:
        TypeError: `model` is none of warpformer's.
        FileExistsError: the folder has a checkpoint of several files, which `load` would read instead.
    """
    package, _, model_type = type(model).__module__.rpartition(".")
    if package != "warpformer.models":
        raise TypeError(f"save: model must be of warpformer.models, not {type(model).__name__}")
    folder = Path(folder).expanduser()
    if (folder / "model.safetensors.index.json").exists():
        raise FileExistsError(f"{folder} has the checkpoint of model.safetensors.index.json")
    config = {"model_type": model_type, **asdict(model.config)}
    quantization = quantization_config(model)
    if quantization:
        config["quantization_config"] = quantization
    folder.mkdir(parents=True, exist_ok=True)
    original = sys.modules[type(model).__module__].original
    state = {original(name): value.contiguous() for name, value in model.state_dict().items()}
    partial = folder / "model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
