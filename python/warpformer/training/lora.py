"""Low-rank adapters: the few parameters that are trained of a model that stays as it is."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from warpformer._C import InputError
from warpformer.checkpoint import read_json
from warpformer.models._config import CheckpointError
from warpformer.nn import LoRALinear, PackedLinear
from warpformer.nn.lora_linear import is_adaptable, parts_of
from warpformer.nn.quantized_linear import QuantizedLinear
from warpformer.save import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # as peft has them
PREFIX = "base_model.model."
BLOCKS = "*layers.*"
REFUSED = {  # fields of peft's config that make other adapters, unless they have this value
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "lora_bias": False,
}


def add_lora_(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16.0,
    targets: str | Iterable[str] = BLOCKS,
    dropout: float = 0.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Freezes a model, and gives its linear layers adapters that train, in place.

    Args:
        model: with linear layers of warpformer.nn, in floats or quantized; experts of a mixture stay as they
            are.
        rank, alpha, dropout, dtype: as in `warpformer.nn.LoRALinear`.
        targets: names of layers or of parts of them ("*.attention.qkv.q"), * and ? as wildcards; all
            linear layers of the blocks if it is not given.

    Returns:
        Names of the layers and parts that have an adapter now.

    Raises:
        InputError: a pattern of `targets` fits no layer, or a number is out of its range.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    chosen, unused = [], set(patterns)
    for layer, part in adaptable_parts(model):
        name = joined(layer, part)
        fitting = [p for p in patterns if fnmatchcase(name, p) or fnmatchcase(layer, p)]
        unused.difference_update(fitting)
        if fitting:
            chosen.append((layer, part))
    if unused or not chosen:
        raise InputError(f"add_lora_: targets = {sorted(unused)} are no linear layers of the model")
    adapt_(model, chosen, rank, alpha, dropout, dtype)
    return [joined(*each) for each in chosen]


def adaptable_parts(model) -> list[tuple[str, str]]:
    """(name of a linear layer, name of a part of it) of all that have no adapter."""
    inside = {module.base for module in model.modules() if isinstance(module, LoRALinear)}
    return [
        (name, part)
        for name, module in model.named_modules()
        if is_adaptable(module) and module not in inside
        for part in parts_of(module)
    ]


def joined(layer: str, part: str) -> str:
    return f"{layer}.{part}" if part else layer


def adapt_(model, chosen, rank, alpha, dropout, dtype=torch.float32):
    """Gives an adapter to each (layer, part)."""
    model.requires_grad_(False)
    parts = {}
    for layer, part in chosen:
        parts.setdefault(layer, []).append(part)
    for layer, names in parts.items():
        base = model.get_submodule(layer)
        adapter = LoRALinear(base, rank, alpha, dropout, parts=names, dtype=dtype)
        model.set_submodule(layer, adapter.train(base.training))
    for _, adapter in adapters(model):
        for parameter in (adapter.A, *adapter.B):
            parameter.requires_grad_(True)


def adapters(model) -> list[tuple[str, LoRALinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear)]


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the adapters, under the names that peft gives them: those of transformers' modules for
    models of warpformer.models, else those that the modules have."""
    state = {}
    for layer, adapter in adapters(model):
        for part, A, B in zip(adapter.adapted, adapter.A.split(adapter.rank), adapter.B, strict=True):
            name = PREFIX + their_name(model, joined(layer, part))
            state |= {f"{name}.lora_A.weight": A.detach(), f"{name}.lora_B.weight": B.detach()}
    return state


def key_map(model):
    return getattr(sys.modules[type(getattr(model, "backbone", model)).__module__], "KEYS", None)


def their_name(model, name: str) -> str:
    keys = key_map(model)
    if keys is None:
        return name
    return keys.theirs(f"{name}.weight", getattr(model, "prefix", None)).removesuffix(".weight")


def save_lora(model: nn.Module, folder) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which `load_lora_` reads, and peft.

    Raises:
        InputError: the model has no adapters, or such of several ranks.
    """
    found = [adapter for _, adapter in adapters(model)]
    kinds = {(adapter.rank, adapter.alpha, adapter.dropout.p) for adapter in found}
    if len(kinds) != 1:
        raise InputError(f"save_lora: the model has {len(kinds)} kinds of adapters, not one")
    ((rank, alpha, dropout),) = kinds
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous() for key, tensor in lora_state(model).items()}
    partial = folder / (WEIGHTS + ".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
    ends = PREFIX, ".lora_A.weight"
    names = [key.removeprefix(ends[0]).removesuffix(ends[1]) for key in state if key.endswith(ends[1])]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none"}
    write_json(folder / CONFIG, config | {"target_modules": sorted(names)})


def load_lora_(model: nn.Module, folder) -> list[str]:
    """Freezes a model, and gives it the adapters in a folder that `save_lora` or peft wrote, in place.

    Returns:
        Names of the layers and parts that have an adapter now.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: a file is damaged, or what it holds does not fit the model or is not supported.
        InputError: the model has adapters already.
    """
    if adapters(model):
        raise InputError("load_lora_: the model has adapters already")
    folder = Path(folder).expanduser()
    rank, alpha, dropout = read_adapter_config(folder / CONFIG)
    with ExitStack() as files:
        path = folder / WEIGHTS
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
            state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    given = adapters_of(state, model)
    check_adapters(given, rank, model)
    dtype = next(iter(given.values()))["A"].dtype
    adapt_(model, given, rank, alpha, dropout, dtype)
    with torch.no_grad():
        for layer, adapter in adapters(model):
            for part, A, B in zip(adapter.adapted, adapter.A.split(rank), adapter.B, strict=True):
                A.copy_(given[layer, part]["A"])
                B.copy_(given[layer, part]["B"])
    return [joined(*each) for each in given]


def read_adapter_config(path: Path) -> tuple[int, float, float]:
    """Rank, alpha and dropout."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type = {config.get('peft_type')!r:.80} is not 'LORA'")
    for key, plain in REFUSED.items():
        if config.get(key) not in (plain, None):
            raise CheckpointError(f"{path}: {key} = {config[key]!r:.80} is not supported")
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r = {rank!r:.80} is no rank")
    if type(alpha) not in (int, float) or type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise CheckpointError(
            f"{path}: lora_alpha = {alpha!r:.80} or lora_dropout = {dropout!r:.80} is wrong"
        )
    return rank, alpha, dropout


def adapters_of(state: dict[str, Tensor], model) -> dict[tuple[str, str], dict[str, Tensor]]:
    """(layer, part) -> its A and B, in the order of the model."""
    parts = {f"{joined(*each)}.weight": each for each in adaptable_parts(model)}
    keys, prefix = key_map(model), getattr(model, "prefix", None)
    found, unknown = {}, []
    for key, tensor in state.items():
        module, _, kind = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        name = f"{module}.weight"
        name = name if keys is None else keys.ours(name, parts, prefix)
        if kind in ("A", "B") and name in parts:
            found.setdefault(parts[name], {})[kind] = tensor
        else:
            unknown.append(key)
    if unknown or not found:
        raise CheckpointError(f"{WEIGHTS}: {unknown[:8]} belong to no linear layer of the model")
    return {each: found[each] for each in parts.values() if each in found}


def check_adapters(given, rank, model):
    wrong = []
    for (layer, part), tensors in given.items():
        base = model.get_submodule(layer)
        for kind, shape in (("A", (rank, base.in_features)), ("B", (parts_of(base)[part], rank))):
            there = tuple(tensors[kind].shape) if kind in tensors else None
            if there != shape:
                wrong.append(f"lora_{kind} of {joined(layer, part)} is {there}, not {shape}")
    if wrong:
        raise CheckpointError(f"{WEIGHTS}: {'; '.join(wrong[:8])}")


@torch.no_grad()
def merge_lora_(model: nn.Module) -> None:
    """Adds the adapters to the weights that they stand beside, in place: the layers are then as before
    `add_lora_`, and frozen.

    Raises:
        InputError: a layer is quantized, and its weight cannot take what is added. None is then changed.
    """
    for name, adapter in adapters(model):
        if isinstance(adapter.base, QuantizedLinear):
            raise InputError(
                f"merge_lora_: {name} is quantized to {adapter.base.format}: save_lora keeps its adapter"
            )
    for name, adapter in adapters(model):
        base, weight = adapter.base, adapter.weight
        if isinstance(base, PackedLinear):
            base.pack(weight)
        else:
            base.weight.copy_(weight)
        model.set_submodule(name, base)
