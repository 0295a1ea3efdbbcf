"""From a model to a checkpoint that `warpformer.load` reads."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from warpformer._C import InputError
from warpformer.checkpoint import INDEX
from warpformer.load import has_head, tied_modules
from warpformer.nn import LoRALinear, PackedEmbedding
from warpformer.quantization.config import quantization_config

GIB = 1 << 30


def save(model: nn.Module, folder, max_shard_size: int = 5 * GIB) -> None:
    """Writes config.json, generation_config.json if the model has one, and the weights in safetensors files,
    quantized layers as they are.

    Tensors have the names that transformers gives them, which also reads the checkpoint if nothing in it is
    quantized.

    Args:
        model: what `warpformer.load` returned, quantized or not, or a model of warpformer.models.
        folder: where to; made if it is not there. Each file takes its name when it is whole.
        max_shard_size: bytes of tensors in a file: one file is model.safetensors, several come with an
            index. No more of the model than that is unpacked at a time.

    Raises:
        TypeError: `model` is none of warpformer's.
        FileExistsError: the folder has a checkpoint of several files.
        InputError: max_shard_size is not positive, or layers have adapters.
    """
    module = sys.modules[type(getattr(model, "backbone", model)).__module__]
    if not module.__name__.startswith("warpformer.models."):
        raise TypeError(f"save: model must be of warpformer.models, not {type(model).__name__}")
    if max_shard_size < 1:
        raise InputError(f"save: max_shard_size = {max_shard_size} is no number of bytes")
    if any(isinstance(layer, LoRALinear) for layer in model.modules()):
        raise InputError("save: the model has adapters: training.save_lora, or training.merge_lora_ before")
    folder = Path(folder).expanduser()
    if (folder / INDEX).exists():
        raise FileExistsError(f"{folder} has the checkpoint of {INDEX}")
    folder.mkdir(parents=True, exist_ok=True)
    shards, weight_map, size = [], {}, 0
    for shard in shards_of(model, module.KEYS, max_shard_size):
        partial = folder / f"{len(shards)}.safetensors.partial"
        save_file(shard, partial, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, len(shards))
        size += sum(tensor.nbytes for tensor in shard.values())
        shards.append(partial)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for partial, name in zip(shards, names, strict=True):
        os.replace(partial, folder / name)
    if len(shards) > 1:
        weight_map = {key: names[i] for key, i in sorted(weight_map.items())}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    write_json(folder / "config.json", config_of(model, module))
    if getattr(model, "generation_config", None):
        write_json(folder / "generation_config.json", model.generation_config)


def shards_of(model, keys, max_shard_size) -> Iterator[dict[str, Tensor]]:
    """The tensors of a model by their names in checkpoints, so many bytes at a time."""
    shard, size = {}, 0
    for key, tensor in stored_tensors(model, keys):
        if size and size + tensor.nbytes > max_shard_size:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    yield shard


def stored_tensors(model, keys) -> Iterator[tuple[str, Tensor]]:
    """Name in checkpoints and value of each tensor, once where modules share it."""
    prefix = getattr(model, "prefix", None)
    tied = {name for name in tied_modules(model) if not hasattr(model.get_submodule(name), "format")}
    for name, module in tqdm([*model.named_modules()], "Saving", unit="module", leave=None, disable=None):
        state = {}
        if isinstance(module, PackedEmbedding):
            state["weight"] = module.weight
        module._save_to_state_dict(state, "", keep_vars=False)
        if name in tied:
            state.pop("weight", None)
        for key, value in state.items():
            full = f"{name}.{key}" if name else key
            value = value.mT if keys.is_transposed(full) else value
            yield keys.theirs(full, prefix), value.contiguous()


def config_of(model, module) -> dict:
    """The config.json that the model was loaded by, or that of its config."""
    head = type(model) if has_head(model) else None
    values = getattr(model.config, "source", None)
    if values is None:
        values = {key: value for key, value in asdict(model.config).items() if value is not None}
        values["model_type"] = module.__name__.rpartition(".")[2]
        values["architectures"] = [next(name for name, cls in module.HEADS.items() if cls is head)]
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype is not None:
        values["dtype"] = str(dtype).removeprefix("torch.")
    quantization = quantization_config(model)
    return values | ({"quantization_config": quantization} if quantization else {})


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
