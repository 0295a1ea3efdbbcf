"""The files of a checkpoint as Hugging Face writes them: config.json and tensors that are not read yet."""

import json
import mmap
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
HUB_FILES = ["*.json", "chat_template.jinja", "*/config.json", "*.safetensors"]
DATA = Path(__file__).parent / "data"  # models that come with the package
INDEX = "model.safetensors.index.json"


class MappedFile:
    """The bytes of a file, which the system reads where they are touched.

    Attributes:
        bytes: a private map: what is written to it stays in memory, until it is released.
    """

    def __init__(self, path: Path):
        with path.open("rb") as file:
            # Torch knows no tensors that cannot be written to.
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def release(self, begin: int, end: int) -> None:
        """Lets the memory of what was read go; to touch it reads it again."""
        begin -= begin % mmap.PAGESIZE
        if begin < end:
            self.bytes.madvise(mmap.MADV_DONTNEED, begin, end - begin)


class StoredTensor:
    """A tensor of a safetensors file.

    Attributes:
        key: its name there.
        shape: a tuple.
        dtype: a torch dtype; the name of one that is not among DTYPES.
    """

    def __init__(self, file: MappedFile, key: str, shape, dtype: str, begin: int, end: int):
        self.key = key
        self.shape = tuple(shape)
        self.dtype = DTYPES.get(dtype, dtype)
        self._file = file
        self._begin, self._end = begin, end

    def read(self) -> Tensor:
        """The values, which lie in the mapped file: copy what is to stay, and `release` it."""
        if self._begin == self._end:
            return torch.empty(self.shape, dtype=self.dtype)
        size = self._end - self._begin
        values = torch.frombuffer(self._file.bytes, dtype=torch.uint8, count=size, offset=self._begin)
        if self._begin % self.dtype.itemsize:
            values = values.clone()
        return values.view(self.dtype).view(self.shape)

    def release(self) -> None:
        self._file.release(self._begin, self._end)


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


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """By name, of all files."""
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
            with safe_open(path, framework="np"):
                tensors |= stored_tensors(MappedFile(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
    return tensors


def stored_tensors(file: MappedFile) -> dict[str, StoredTensor]:
    """Those of a safetensors file whose header was checked: its length in 8 bytes, then JSON."""
    start = 8 + int.from_bytes(file.bytes[:8], "little")
    header = json.loads(file.bytes[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for key, info in header.items():
        begin, end = info["data_offsets"]
        tensors[key] = StoredTensor(file, key, info["shape"], info["dtype"], start + begin, start + end)
    return tensors
