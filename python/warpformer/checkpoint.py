"""The files of a checkpoint as Hugging Face writes them: config.json and tensors that are not read yet."""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from warpformer.models._config import CheckpointError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}  # as safetensors names them
HUB_FILES = ["*.json", "*/config.json", "*.safetensors"]
DATA = Path(__file__).parent / "data"  # models that come with the package
INDEX = "model.safetensors.index.json"


class StoredTensor:
    """A tensor of an open safetensors file.

    Attributes:
        key: its name there.
        shape: a tuple.
        dtype: a torch dtype; the name of one that is not among DTYPES.
    """

    def __init__(self, file, key: str):
        self._file = file
        self.key = key
        stored = file.get_slice(key)
        self.shape = tuple(stored.get_shape())
        self.dtype = DTYPES.get(stored.get_dtype(), stored.get_dtype())

    def read(self) -> Tensor:
        """The values, which lie in the mapped file: copy what is to stay."""
        return self._file.get_tensor(self.key)


def find_checkpoint(path_or_hub_id) -> Path:
    """The folder itself, or that of the repository, which is downloaded."""
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


def default_model(name: str) -> Path:
    """The folder of a model that comes with the package."""
    folder = DATA / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no {name.replace('_', ' ')} comes with this installation: give --model")
    return folder


def open_tokenizer(folder: Path) -> Tokenizer:
    """That of tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path} is no tokenizer: {error}") from error


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


def open_tensors(folder: Path, files: ExitStack) -> dict[str, StoredTensor]:
    """By name, of all files; these stay open until `files` closes."""
    index = folder / INDEX
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
        tensors.update({key: StoredTensor(file, key) for key in file.keys()})  # noqa: SIM118
    return tensors
