"""Checkpoints of llama.cpp, each a file with metadata and tensors, as those of transformers they were."""

import re
from pathlib import Path
from typing import NamedTuple

from warpformer.checkpoint import MappedFile
from warpformer.gguf._architectures import LONGROPE_FACTORS, ROPE_FACTORS, Architecture, architecture_of
from warpformer.gguf._header import TENSORS, TensorInfo, read_header
from warpformer.gguf._tensor import GgufTensor
from warpformer.models._config import CheckpointError

__all__ = ["Gguf", "GgufTensor", "open_gguf"]

SPLIT = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
IN_CONFIG = (ROPE_FACTORS, *LONGROPE_FACTORS)


class Gguf(NamedTuple):
    """
    Attributes:
        metadata: all of the file's, as it has them.
        config: the fields of a config.json.
        tensors: by their names in a checkpoint of transformers; those without one have that of the file.
    """

    metadata: dict
    config: dict
    tensors: dict[str, GgufTensor]


def open_gguf(path) -> Gguf:
    """Maps a GGUF file, of which nothing but the header is read yet.

    Rows of queries and keys, which llama.cpp lets lie in pairs (i, i + D / 2) for its rope, and weights of
    norms to which it has added 1, are as a checkpoint has them. Experts are tensors of their own.

    Args:
        path: of a file of the architecture llama (Llama, Mistral, Mixtral), qwen2, qwen3, gemma2, phi3,
            nemotron, gpt-oss, deepseek2 (DeepSeek-V2), gpt2 or bert; or of one of several, as llama.cpp
            splits them, <name>-00001-of-0000N.gguf, which lie beside each other.

    Returns:
        What the file holds. Of its config only sizes that had to be computed with are checked.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, or of an architecture that is not known; the tensor is named.

    Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; llama.cpp's conversion of each model.
    """
    path = Path(path).expanduser()
    files = _open_all(path)
    metadata = files[0][1]
    stored = [(info, file) for file, _, infos in files for info in infos]
    try:
        plain = {info.name: _stored(info, file) for info, file in stored}
        if len(plain) < len(stored):
            raise CheckpointError("a tensor is in two of its files")
        architecture = architecture_of(metadata)
        config = architecture.config(metadata, plain)
        tensors = {}
        for info, file in stored:
            if info.name not in IN_CONFIG:
                tensors |= _named(architecture, config, info, file)
            if len(tensors) > TENSORS:
                raise CheckpointError(f"it has more than {TENSORS} tensors")
        tensors = architecture.joined(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Gguf(metadata, config, tensors)


def _open_all(path: Path) -> list[tuple[MappedFile, dict, list[TensorInfo]]]:
    """The file, or all that it is one of, the first of which has the metadata."""
    opened = _open(path)
    count = opened[1].get("split.count", 1)
    if count in (0, 1):
        return [opened]
    name = SPLIT.fullmatch(path.name)
    if name is None or int(name[2]) != count:
        raise CheckpointError(f"{path}: it is one of {count!r:.20} files, and not named <name>-00001-of-...")
    paths = [path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    files = [_open(each) for each in paths]
    for i, (each, (_, metadata, _)) in enumerate(zip(paths, files, strict=True)):
        if (metadata.get("split.no"), metadata.get("split.count")) != (i, count):
            raise CheckpointError(f"{each}: it is not part {i} of {count} files")
    return files


def _open(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        if not path.stat().st_size:
            raise CheckpointError("it is empty")
        file = MappedFile(path)
        return file, *read_header(file.bytes)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _named(architecture: Architecture, config, info: TensorInfo, file) -> dict[str, GgufTensor]:
    stem, _, leaf = info.name.rpartition(".")
    kind = stem.rpartition(".")[-1]
    options = {}
    if architecture.rope_pairs and kind in ("attn_q", "attn_k"):
        field = "num_attention_heads" if kind == "attn_q" else "num_key_value_heads"
        heads = config.get(field, config.get("num_attention_heads"))
        if type(heads) is not int or heads < 1 or info.shape[0] % (2 * heads):
            raise CheckpointError(
                f"the tensor {info.name!r} of {list(info.shape)} is not of {heads!r:.20} heads of two halves"
            )
        options["heads"] = heads
    if architecture.norm_offset and kind.endswith("norm") and leaf == "weight":
        options["offset"] = architecture.norm_offset
    tensor = _stored(info, file, **options)
    is_stack = kind.endswith("_exps") and len(info.shape) == 3 and info.shape[0] <= TENSORS
    names = architecture.names(info.name, info.shape[0] if is_stack else 0)
    if not names:
        return {info.name: tensor}
    if not is_stack or names == architecture.names(info.name, 0):  # or a checkpoint has the stack
        return {names[0]: tensor}
    return {name: tensor.part(e) for e, name in enumerate(names)}


def _stored(info: TensorInfo, file: MappedFile, **options) -> GgufTensor:
    return GgufTensor(file, *info, **options)
