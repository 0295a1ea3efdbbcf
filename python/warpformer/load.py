"""From a checkpoint as Hugging Face writes it (config.json and safetensors) to a model."""

import importlib
import json
import logging
import pkgutil
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from warpformer import models
from warpformer.models._config import CheckpointError, read_config

log = logging.getLogger("warpformer")

HUB_FILES = ["*.json", "*/config.json", "*.safetensors"]


def load(path_or_hub_id, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
    """The model of a checkpoint, in eval mode, without gradients.

    Args:
        path_or_hub_id: a folder with config.json and *.safetensors, or, where no such folder is, the id
            of a repository of the Hugging Face hub, which is then downloaded.
        dtype: of the parameters and activations; that of the checkpoint if None.
        device: of the parameters; the CPU if None.

    Returns:
        `warpformer.models.<model_type>.Model`.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        CheckpointError: a file is damaged, its architecture is unknown, or its tensors are not those
            that config.json promises. Nothing is unpickled, and no code of a checkpoint is run.
    """
    folder = find_checkpoint(path_or_hub_id)
    values = read_json(folder / "config.json")
    module = model_module(values)
    config = read_config(module.Config, values)
    with ExitStack() as files:
        tensors = open_tensors(folder, files)
        ours = {}
        for key, file in tensors.items():
            name = module.rename(key)
            if name is not None:
                ours[name] = (key, file)
        # On the meta device a model has shapes and no memory: all is checked before any is allocated.
        with torch.device("meta"):
            model = module.Model(config)
        model.drop_missing(set(ours))
        check_shapes(model, ours)
        # Copies: what the file's pages hold may change under a mapped tensor.
        state = {
            name: file.get_tensor(key).to(device=device, dtype=dtype, copy=True)
            for name, (key, file) in ours.items()
        }
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def find_checkpoint(path_or_hub_id) -> Path:
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_hub_id)
    if folder.exists():
        raise CheckpointError(f"{name} is a file: give the folder that holds config.json and the weights")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise FileNotFoundError(f"no checkpoint folder {name!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name!r} is no folder, nor a model of the hub: {reason}") from error


def read_json(path: Path, expected: type = dict):
    """The object (or array) in the JSON file at `path`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if type(value) is not expected:
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not a {expected.__name__}")
    return value


def model_module(values):
    known = sorted(m.name for m in pkgutil.iter_modules(models.__path__) if not m.name.startswith("_"))
    model_type = values.get("model_type")
    if model_type not in known:
        raise CheckpointError(f"config.json: model_type = {model_type!r:.80} is none of {known}")
    return importlib.import_module(f"warpformer.models.{model_type}")


def open_tensors(folder: Path, files: ExitStack):
    """Tensor name -> open safetensors file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if type(weight_map) is not dict or not all(type(v) is str for v in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map of file names")
        names = sorted(set(weight_map.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index} names files outside its folder")
    else:
        names = ["model.safetensors"]
    tensors = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            pickled = any(folder.glob("*.bin"))
            hint = " (there are *.bin files: pickled weights are never read)" if pickled else ""
            raise FileNotFoundError(f"{path} is missing{hint}")
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        tensors.update(dict.fromkeys(file.keys(), file))
    return tensors


def expected_shapes(model):
    shapes = {}
    for prefix, module in model.named_modules():
        dot = prefix + "." if prefix else ""
        if hasattr(module, "state_keys"):
            kinds = ("weight", "bias") if module.bias is not None else ("weight",)
            own = {key: shape for kind in kinds for key, shape in module.state_keys(kind).items()}
        else:
            own = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
        shapes |= {dot + key: shape for key, shape in own.items()}
    return shapes


def check_shapes(model, ours):
    expected = expected_shapes(model)
    missing = [name for name in expected if name not in ours]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    for name in [name for name in ours if name not in expected]:
        key, _ = ours.pop(name)
        log.warning("the tensor %r of the checkpoint is not part of the model", key)
    for name, shape in expected.items():
        key, file = ours[name]
        stored = file.get_slice(key)
        found = tuple(stored.get_shape())
        if stored.get_dtype() not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"the tensor {key!r} has dtype {stored.get_dtype()}, not F32, F16 or BF16")
        if found != shape:
            raise CheckpointError(
                f"the tensor {key!r} has shape {list(found)}, but config.json makes it {list(shape)}"
            )
