"""The state of a run of training, on the disk: folders `checkpoint-<step>` of safetensors and JSON."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from warpformer.checkpoint import read_json
from warpformer.models._config import CheckpointError
from warpformer.training.objectives.objective import Objective

KEPT = 2
NAME = re.compile(r"checkpoint-(\d+)")
SAMPLED = 1000  # examples that the fingerprint of an objective is made of
FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass
class Progress:
    """How far a run is. Everything random follows from it and the seed: no state of a generator is kept."""

    step: int = 0
    epoch: int = 0
    batch: int = 0  # micro-batches of each process that this epoch has done
    tokens: int = 0  # of all processes
    seconds: float = 0.0
    evaluated: int = 0  # the step of the last evaluation
    best_step: int = 0
    best_loss: float | None = None
    evaluations_since_best: int = 0


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name; what modules share, once."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def write_checkpoint(
    out: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, identity: dict
) -> Path:
    """Writes `checkpoint-<step>`: the trained parameters, the state of the optimizer, `progress`, and what a
    run must share to go on from here. The folder has its name once all of it is on the disk, and only then
    all but the two newest go.

    Args:
        out: the folder of the run.
        optimizer: its parameters are those of `trained_parameters`, in any order.
        identity: JSON, compared by `read_checkpoint`.
    """
    folder = out / f"checkpoint-{progress.step}"
    for stale in out.glob("checkpoint-*.partial"):
        shutil.rmtree(stale)
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True)
    tensors = {name: value.detach().contiguous() for name, value in trained_parameters(model).items()}
    save_file(tensors, partial / FILES[0])
    save_file(optimizer_state(model, optimizer), partial / FILES[1])
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": sha256(partial / name)} for name in FILES
    }
    state = {"progress": asdict(progress), "identity": identity, "files": files}
    (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        sync(path)
    os.rename(partial, folder)
    sync(out)
    for old in checkpoints(out)[:-KEPT]:
        doomed = old.with_name(old.name + ".partial")  # never a checkpoint of which a part is gone
        os.rename(old, doomed)
        shutil.rmtree(doomed)
    return folder


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, parameter in trained_parameters(model).items()
        for key, value in optimizer.state[parameter].items()
    }


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = {int(match[1]): path for path in out.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def read_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, identity: dict, free: tuple[str, ...] = ()
) -> Progress:
    """Puts a checkpoint into a model and its optimizer. Nothing of these changes before all is checked.

    Args:
        identity: what was given to `write_checkpoint`; must be the same, but for what is in `free`.
        free: names in identity["train"].

    Raises:
        CheckpointError: a file is missing, damaged or does not fit; it names the file.
    """
    path = folder / "state.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    state = read_json(path)
    progress = read_progress(path, state.get("progress"))
    files = state.get("files")
    for name in FILES:
        check_file(folder / name, files.get(name) if type(files) is dict else None)
    found = state.get("identity")
    if type(found) is not dict:
        raise CheckpointError(f"{path} has no identity")
    check_identity(path, found, identity, free)
    parameters = trained_parameters(model)
    weights, moments = (load_file(folder / name) for name in FILES)
    check_tensors(folder / FILES[0], weights, {name: value.shape for name, value in parameters.items()})
    put_optimizer_state(folder / FILES[1], parameters, optimizer, moments)
    for name, parameter in parameters.items():
        parameter.detach().copy_(weights[name])
    return progress


def put_optimizer_state(path: Path, parameters: dict[str, nn.Parameter], optimizer: Optimizer, moments):
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state = {index: {} for index in range(len(order))}
    indices = {name: index for index, name in enumerate(order)}
    for key, value in moments.items():
        name, _, kind = key.rpartition(".")
        if name not in indices:
            raise CheckpointError(f"{path}: {key!r} is of no parameter of the model")
        if value.ndim and value.shape != parameters[name].shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {[*value.shape]}, not {[*parameters[name].shape]}"
            )
        state[indices[name]][kind] = value.clone()  # in memory of its own, not in the file's pages
    kinds = {frozenset(entry) for entry in state.values()}
    if len(kinds) > 1:
        raise CheckpointError(f"{path} lacks the state of some parameters")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def read_progress(path: Path, values) -> Progress:
    names = {field.name for field in fields(Progress)}
    if type(values) is not dict or values.keys() != names:
        raise CheckpointError(f"{path}: progress has not the fields {sorted(names)}")
    for name, value in values.items():
        kinds = (float, type(None)) if name == "best_loss" else (type(getattr(Progress, name)),)
        if type(value) not in kinds:
            raise CheckpointError(f"{path}: progress.{name} = {value!r:.80} is no {kinds[0].__name__}")
    return Progress(**values)


def check_file(path: Path, expected):
    if type(expected) is not dict or expected.keys() != {"bytes", "sha256"}:
        raise CheckpointError(f"{path.with_name('state.json')} says nothing of {path.name}")
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise CheckpointError(
            f"{path} is damaged: it has {size} bytes, and was written with {expected['bytes']}"
        )
    if sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not that of state.json")


def check_identity(path: Path, found: dict, identity: dict, free: tuple[str, ...]):
    """That this is the run that the checkpoint is of."""
    found, identity = flat(found), flat(identity)
    ignored = {f"train.{name}" for name in free}
    for name in sorted((found.keys() | identity.keys()) - ignored):
        if found.get(name) != identity.get(name):
            raise CheckpointError(
                f"{path} is of another run: {name} = {found.get(name)!r:.80} there, "
                f"{identity.get(name)!r:.80} here"
            )


def fingerprint(objective: Objective) -> str:
    """Of the examples: all lengths, and the values of a thousand."""
    digest = hashlib.sha256(np.ascontiguousarray(objective.lengths(), np.int64))
    count = objective.examples
    for index in np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(int)).tolist():
        for name, value in sorted(objective.example(index, 0).items()):
            digest.update(f"{name} {value.dtype} {value.shape}".encode())
            digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()


def flat(values: dict, prefix: str = "") -> dict:
    """{"a.b": 1} of {"a": {"b": 1}}"""
    out = {}
    for key, value in values.items():
        out |= flat(value, f"{prefix}{key}.") if type(value) is dict else {prefix + key: value}
    return out


def check_tensors(path: Path, tensors: dict[str, Tensor], shapes: dict):
    for name in sorted(tensors.keys() ^ shapes.keys()):
        where = "is not in the model" if name in tensors else "is missing"
        raise CheckpointError(f"{path} is of another model: {name!r} {where}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path} is of another model: {name!r} has shape {[*tensors[name].shape]}, not {[*shape]}"
            )


def sha256(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path):
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
