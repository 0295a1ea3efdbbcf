"""From a checkpoint as Hugging Face writes it (config.json and safetensors) to a model."""

import importlib
import logging
import pkgutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from warpformer import models
from warpformer._C import InputError
from warpformer.checkpoint import find_checkpoint, open_tensors, read_json
from warpformer.generation import Generating
from warpformer.generation.defaults import name_ignored
from warpformer.models._config import CheckpointError, read_config
from warpformer.models._keys import KeyMap
from warpformer.nn import PackedEmbedding
from warpformer.nn._parts import StateInParts
from warpformer.nn.quantized_linear import QuantizedLinear
from warpformer.ops._quantized import FLOATS
from warpformer.quantization.config import prepare_model
from warpformer.quantization.mxfp4 import joined_mxfp4
from warpformer.quantization.quantize_ import Plan, with_weight

log = logging.getLogger("warpformer")
NAMED = 8  # of the tensors that do not fit, so many are named


def load(
    path_or_hub_id,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    quantization: str | dict | None = None,
    trainable: bool = False,
    head: bool = True,
):
    """The model of a checkpoint.

    Args:
        path_or_hub_id: a folder with config.json and *.safetensors; a .gguf file of llama.cpp, whose Q4_0 and
            Q8_0 layers stay as they are; or, where no such folder is, the id of a repository of the Hugging
            Face hub, which is then downloaded.
        dtype: of the parameters and activations; that of the checkpoint if None.
        device: of the parameters; the CPU if None.
        quantization: a mode of `warpformer.quantize_`, or its arguments ({"mode": "int4", "group_size": 32}):
            each linear layer is quantized as it is read, from the dtype of the checkpoint, so that the float
            model is never whole in memory. A quantized checkpoint of `warpformer.save` stays as it is.
        trainable: whether to leave linear layers as they train; if not they are packed, each as it is read,
            and the model is in eval mode and without gradients.
        head: False for the model that gives hidden states, whatever config.json's `architectures` has around
            it; of T5 and mT5 that is the encoder.

    A generation_config.json beside them has the defaults of the model's `generate`.

    Returns:
        `warpformer.models.<model_type>.Model`, or what config.json's `architectures` has around it:
        a language model, a classifier.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        CheckpointError: a file is damaged, its architecture is unknown, or its tensors are not those
            that config.json promises. Nothing is unpickled, and no code of a checkpoint is run.
        InputError: an option of quantization is unknown or does not fit, or the checkpoint is quantized.
    """
    values, stored, generation_config = open_checkpoint(path_or_hub_id)
    module = model_module(values)
    if not head:
        values = values | {"architectures": [headless(module)]}
    # On the meta device a model has shapes and no memory: all is checked before any is allocated.
    with torch.device("meta"):
        model = build(module, values)
    if values.get("quantization_config") is not None:
        prepare_model(model, values["quantization_config"])
        for name in [*tied_modules(model)]:  # what is quantized has a weight of its own
            if isinstance(model.get_submodule(name), QuantizedLinear):
                del model.tied[name]
    tensors = by_name(model, module.KEYS, stored)
    if not head:
        tensors = {name: tensors[name] for name in expected_state(model) if name in tensors}
    check(model, module.KEYS, tensors)
    reader = Reader(module.KEYS, tensors, dtype, device)
    fill(model, reader, plan_of(model, quantization), trainable)
    model.config.source = values
    if isinstance(model, Generating):
        model.generation_config = generation_config
    return model if trainable else model.eval().requires_grad_(False)


def open_checkpoint(path_or_hub_id):
    """config.json, or what a GGUF file has in its place, the tensors by their names there, and
    generation_config.json."""
    path = Path(path_or_hub_id).expanduser()
    if path.suffix == ".gguf":
        from warpformer.gguf import open_gguf  # which few need, and which imports much

        checkpoint = open_gguf(path)
        return checkpoint.config, checkpoint.tensors, {}
    folder = find_checkpoint(path_or_hub_id)
    values, tensors = read_json(folder / "config.json"), open_tensors(folder)
    quantization = values.get("quantization_config")
    if type(quantization) is dict and quantization.get("quant_method") == "mxfp4":
        del values["quantization_config"]  # of the original gpt-oss: read as the bfloat16 that it stands for
        tensors = joined_mxfp4(tensors)
    path = folder / "generation_config.json"
    generation_config = read_json(path) if path.is_file() else {}
    name_ignored(generation_config)
    return values, tensors, generation_config


def model_module(values):
    known = sorted(m.name for m in pkgutil.iter_modules(models.__path__) if not m.name.startswith("_"))
    model_type = values.get("model_type")
    name = model_type.replace("-", "_") if type(model_type) is str else None
    if name not in known:
        raise CheckpointError(f"config.json: model_type = {model_type!r:.80} is none of {known}")
    return importlib.import_module(f"warpformer.models.{name}")


def headless(module) -> str:
    """The architecture of hidden states."""
    encoders = [name for name in module.HEADS if name.endswith("EncoderModel")]
    return encoders[0] if encoders else next(name for name, cls in module.HEADS.items() if cls is None)


def build(module, values) -> nn.Module:
    """The model of a config, with new parameters."""
    config = read_config(module.Config, values)
    architectures = values.get("architectures") or [*module.HEADS][:1]
    name = architectures[0] if type(architectures) is list else architectures
    if type(name) is not str or name not in module.HEADS:
        raise CheckpointError(f"config.json: architectures = {name!r:.80} is none of {[*module.HEADS]}")
    backbone, head = module.Model(config), module.HEADS[name]
    return backbone if head is None else head(backbone, config)


def has_head(model) -> bool:
    return hasattr(model, "backbone")


def by_name(model, keys, stored):
    """The name here of each tensor of the checkpoint -> that tensor. What is optional in a model and not
    there is taken out of it, or tied to the embedding that `tied_if_missing` names."""
    expected, prefix = expected_state(model), getattr(model, "prefix", None)
    tensors = {keys.ours(key, expected, prefix): tensor for key, tensor in stored.items()}
    tensors.pop(None, None)
    owners = {"": model} | ({"backbone.": model.backbone} if has_head(model) else {})
    for before, owner in owners.items():
        for name in set(getattr(owner, "optional", ())).difference(getattr(model, "needed", ())):
            if not any(f"{key}.".startswith(f"{before}{name}.") for key in tensors):
                setattr(owner, name, None)
    missing = {
        name: table
        for name, table in getattr(model, "tied_if_missing", {}).items()
        if f"{name}.weight" not in tensors
    }
    if missing:
        model.tied = tied_modules(model) | missing
    return tensors


def tied_modules(model) -> dict[str, str]:
    """Name of a layer -> that of the embedding whose table is its weight."""
    return getattr(model, "tied", {})


def plan_of(model, quantization) -> Plan | None:
    if quantization is None:
        return None
    if any(isinstance(layer, QuantizedLinear) for layer in model.modules()):
        raise InputError(f"quantization = {quantization!r}, but the checkpoint is quantized already")
    return Plan(model, **({"mode": quantization} if isinstance(quantization, str) else quantization))


def own_state(name, module, tied):
    """Each tensor of a module, not of those inside it -> the keys whose rows lie one below the other in it
    -> (shape, the dtypes it may have)."""
    if isinstance(module, StateInParts):
        layout = module.layout_by_tensor()
    else:
        parameters = module.named_parameters(recurse=False)
        layout = {key: {key: (tuple(value.shape), FLOATS)} for key, value in parameters}
    if name in tied:
        del layout["weight"]
    before = f"{name}." if name else ""
    return {kind: {f"{before}{key}": value for key, value in keys.items()} for kind, keys in layout.items()}


def expected_state(model):
    """Key of each tensor of a model -> (shape, the dtypes it may have)."""
    tied = tied_modules(model)
    return {
        key: value
        for name, module in model.named_modules()
        for keys in own_state(name, module, tied).values()
        for key, value in keys.items()
    }


def check(model, keys, tensors):
    """That the checkpoint has the tensors of the model, and in which shapes."""
    expected = expected_state(model)
    wrong = [f"{name!r} is missing" for name in expected if name not in tensors]
    for name in [name for name in tensors if name not in expected]:
        log.warning("the tensor %r of the checkpoint is not part of the model", tensors.pop(name).key)
    for name, (shape, dtypes) in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        flipped = is_transposed(keys, name, tensor)
        found = tensor.shape[:-2] + tensor.shape[:-3:-1] if flipped else tensor.shape
        if tensor.dtype not in dtypes and not is_coded(tensor):
            allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            wrong.append(
                f"{tensor.key!r} has dtype {str(tensor.dtype).removeprefix('torch.')}, not {allowed}"
            )
        if found != shape:
            wrong.append(f"{tensor.key!r} has shape {list(found)}, but config.json makes it {list(shape)}")
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise CheckpointError(f"tensors do not fit: {'; '.join(wrong[:NAMED])}{more}")


def is_coded(tensor) -> bool:
    """Whether it may be quantized, in a GGUF file or in MXFP4, and can be read as floats all the same."""
    return hasattr(tensor, "read_dense")


def is_transposed(keys, name, tensor) -> bool:
    return keys.is_transposed(name) and not is_coded(tensor)  # those are as ours, [N, K]


class Reader(NamedTuple):
    """Where the tensors of a model are, by the names here, and how they are to be."""

    keys: KeyMap
    tensors: dict
    dtype: torch.dtype | None
    device: torch.device | str | None

    def read(self, name, dtype, copy: bool = False) -> Tensor:
        """A tensor in `dtype`. What is no copy may lie in the file: it is to be released, and may change."""
        tensor = self.tensors[name]
        stored = tensor.read_dense() if is_coded(tensor) else tensor.read()
        stored = stored.mT if is_transposed(self.keys, name, tensor) else stored
        value = stored.to(self.device, dtype, copy=copy, memory_format=torch.contiguous_format)
        if value is not stored:
            tensor.release()
        return value

    def read_joined(self, layout, dtype) -> Tensor:
        """The tensors of a layer one below the other, no more than one of which is read at a time."""
        joined, end = None, 0
        for name in layout:
            value = self.read(name, dtype)
            if joined is None:
                rows = sum(shape[0] for shape, _ in layout.values())
                joined = value.new_empty(rows, *value.shape[1:])
            joined = joined.to(torch.promote_types(joined.dtype, value.dtype))
            joined[end : end + len(value)] = value
            self.tensors[name].release()
            end += len(value)
        return joined


def fill(model, reader: Reader, plan: Plan | None, trainable: bool):
    """Reads the tensors of one module after the other, and packs or quantizes what is to be."""
    chosen = set() if plan is None else plan.layers.keys() - plan.notes
    tied = tied_modules(model)
    title = "Loading" if plan is None else f"Loading to {plan.mode}"
    names = [name for name, _ in model.named_modules()]  # not the modules: what is packed must be freed
    for name in tqdm(names, title, unit="module", disable=None):
        module = model.get_submodule(name)
        layout = own_state(name, module, tied)
        packs = hasattr(module, "to_packed") and not trainable
        if plan is None and packs and is_quantized_there(layout, reader):
            model.set_submodule(name, quantized_there(module, layout, reader))
        else:
            read_module(name, module, layout, reader, name in chosen, name in chosen or packs)
            if name in tied:
                module.weight = model.get_submodule(tied[name]).weight
            if name in chosen:
                try:
                    model.set_submodule(name, plan.quantize(name))
                    del plan.layers[name]
                except InputError as error:
                    raise CheckpointError(str(error)) from error
            elif packs:
                packed = module.to_packed()
                model.set_submodule(name, packed)
                if name in tied:
                    model.set_submodule(tied[name], PackedEmbedding(packed))
        for key in (key for keys in layout.values() for key in keys):
            reader.tensors[key].release()


def read_module(name, module, layout, reader: Reader, is_chosen: bool, is_replaced: bool):
    """Gives a module its own tensors. Those that will be quantized have the dtype of the checkpoint; the
    weight of what packs it, now or when it is replaced, stays where it is in the file."""
    is_quantized = isinstance(module, QuantizedLinear)
    state = {}
    for kind, keys in layout.items():
        dtype = None if (is_chosen or is_quantized) and kind != "bias" else reader.dtype
        if len(keys) == 1:
            copy = kind == "bias" or not (is_replaced or is_quantized)
            state[kind] = reader.read(*keys, dtype, copy)
        else:
            state[kind] = reader.read_joined(keys, dtype)
    try:
        if isinstance(module, StateInParts):
            module.load_joined(state)
        else:
            module.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error
    if hasattr(module, "init_buffers"):
        module.init_buffers(reader.device)


def is_quantized_there(layout, reader: Reader) -> bool:
    """Whether a linear layer can stay as a GGUF file has it: all of its parts in one format."""
    formats = {getattr(reader.tensors[key], "format", None) for key in layout.get("weight", ())}
    return len(formats) == 1 and None not in formats


def quantized_there(module, layout, reader: Reader) -> QuantizedLinear:
    parts = [reader.tensors[key].read() for key in layout["weight"]]
    rows = module.weight.shape[:-1]
    values, scales = (joined([part[i] for part in parts]).view(*rows, -1) for i in (0, 1))
    weight = parts[0]._replace(values=values.to(reader.device), scales=scales.to(reader.device))
    bias = None
    if "bias" in layout:
        values = joined([reader.read(key, reader.dtype) for key in layout["bias"]]).view(rows)
        bias = nn.Parameter(values.clone(), requires_grad=False)
    return with_weight(module, weight, bias)


def joined(tensors):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
