"""From a checkpoint as Hugging Face writes it (config.json and safetensors) to a model."""

import importlib
import json
import logging
import pkgutil
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from warpformer import models
from warpformer._C import InputError
from warpformer.models._config import CheckpointError, read_config
from warpformer.nn._parts import StateInParts
from warpformer.nn.quantized_linear import QuantizedLinear
from warpformer.ops._quantized import FLOATS
from warpformer.quantization.config import prepare_model
from warpformer.quantization.quantize_ import Plan

log = logging.getLogger("warpformer")

DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}  # as safetensors names them
HUB_FILES = ["*.json", "*/config.json", "*.safetensors"]


def load(
    path_or_hub_id,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantization: str | dict | None = None,
):
    """The model of a checkpoint, in eval mode, without gradients.

    Args:
        path_or_hub_id: a folder with config.json and *.safetensors, or, where no such folder is, the id
            of a repository of the Hugging Face hub, which is then downloaded.
        dtype: of the parameters and activations; that of the checkpoint if None.
        device: of the parameters; the CPU if None.
        quantization: a mode of `warpformer.quantize_`, or its arguments ({"mode": "int4", "group_size": 32}):
            each linear layer is quantized as it is read, from the dtype of the checkpoint, so that the float
            model is never whole in memory. A quantized checkpoint of `warpformer.save` stays as it is.

    Returns:
        `warpformer.models.<model_type>.Model`.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        CheckpointError: a file is damaged, its architecture is unknown, or its tensors are not those
            that config.json promises. Nothing is unpickled, and no code of a checkpoint is run.
        InputError: an option of quantization is unknown or does not fit, or the checkpoint is quantized.
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
        if values.get("quantization_config") is not None:
            prepare_model(model, values["quantization_config"])
        check_shapes(model, ours)
        fill(model, ours, dtype, device, plan_of(model, quantization))
    return model.eval().requires_grad_(False)


def plan_of(model, quantization) -> Plan | None:
    if quantization is None:
        return None
    if any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise InputError(f"quantization = {quantization!r}, but the checkpoint is quantized already")
    return Plan(model, **({"mode": quantization} if isinstance(quantization, str) else quantization))


def fill(model, ours, dtype, device, plan: Plan | None):
    """Reads the tensors of one module after the other, and quantizes it where `plan` says so."""
    chosen = set() if plan is None else plan.layers.keys() - plan.notes
    modules = tqdm([*model.named_modules()], "Quantizing", unit="module", disable=None if chosen else True)
    for name, module in modules:
        quantized = name in chosen or isinstance(module, QuantizedLinear)
        state = {}
        for key in own_state(module):
            tensor_key, file = ours[join(name, key)]
            kept = quantized and not key.endswith("bias")
            # Copies: what the file's pages hold may change under a mapped tensor.
            tensor = file.get_tensor(tensor_key)
            state[key] = tensor.to(device=device, dtype=None if kept else dtype, copy=True)
        try:
            module.load_state_dict(state, strict=False, assign=True)
        except RuntimeError as error:
            raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error
        if name in chosen:
            try:
                model.set_submodule(name, plan.quantize(name)[1])
            except InputError as error:
                raise CheckpointError(str(error)) from error


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


def own_state(module):
    """Key of each tensor of a module, not of those inside it -> (shape, the dtypes it may have)."""
    if isinstance(module, StateInParts):
        return module.state_layout()
    return {key: (tuple(value.shape), FLOATS) for key, value in module.named_parameters(recurse=False)}


def join(prefix, key):
    return f"{prefix}.{key}" if prefix else key


def check_shapes(model, ours):
    expected = {
        join(name, key): layout
        for name, module in model.named_modules()
        for key, layout in own_state(module).items()
    }
    missing = [name for name in expected if name not in ours]
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing, the first is {missing[0]!r}")
    for name in [name for name in ours if name not in expected]:
        key, _ = ours.pop(name)
        log.warning("the tensor %r of the checkpoint is not part of the model", key)
    for name, (shape, dtypes) in expected.items():
        key, file = ours[name]
        stored = file.get_slice(key)
        found = tuple(stored.get_shape())
        known = [DTYPES[dtype] for dtype in dtypes]
        if stored.get_dtype() not in known:
            raise CheckpointError(
                f"the tensor {key!r} has dtype {stored.get_dtype()}, not {' or '.join(known)}"
            )
        if found != shape:
            raise CheckpointError(
                f"the tensor {key!r} has shape {list(found)}, but config.json makes it {list(shape)}"
            )
