"""Sentence embeddings, with the interface of sentence_transformers."""

import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from warpformer import _C
from warpformer.checkpoint import find_checkpoint, open_tensors, open_tokenizer, read_json
from warpformer.load import load
from warpformer.models._config import CheckpointError
from warpformer.nn import PackedLinear, Sequences
from warpformer.ops._library import autocast_dtype, is_direct
from warpformer.ops._quantized import FLOATS
from warpformer.save import save, write_json

POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
SETTINGS = ("prompts", "default_prompt_name", "similarity_fn_name")
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
CPU_TOKENS = 1536  # of a step, about: the activations of more fall out of the caches
LAST_TOKENS = 256  # of the last steps
SHARED_TEXTS = 8  # of a thread, at most: so few are embedded one step after the other, by all threads
READ_AHEAD = 1024  # sentences that are tokenized at a time
UNLIMITED = 1 << 30  # tokens of a sentence
DENSE_ACTIVATIONS = {  # of torch.nn -> of ops.linear
    "Identity": "none",
    "Tanh": "tanh",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
}


class SentenceEncoder:
    """A sentence-transformers model: a transformer, pooling, and the Dense and Normalize modules that its
    modules.json has after it. The transformer is an encoder, a decoder, or the encoder of T5 or mT5.

    Args:
        path_or_hub_id: its folder, or the id of a repository of the Hugging Face hub.
        dtype: of parameters and activations; that of the checkpoint if None. Embeddings are float32.
        device: the CPU if None.
        quantization: as in `warpformer.load`.

    Attributes:
        model: as `warpformer.load` returns it, without a head.
        max_seq_length: tokens of a sentence that are read, special tokens included; the rest is cut off.
        prompts: name -> text that `encode(..., prompt_name=name)` puts before every sentence.
        similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        CheckpointError: a file is damaged or asks for what is not supported.
    """

    def __init__(self, path_or_hub_id, *, dtype: torch.dtype | None = None, device=None, quantization=None):
        folder = find_checkpoint(path_or_hub_id)
        transformer, self.pooling, last = read_modules(folder)
        options = dict(dtype=dtype, device=device, quantization=quantization)
        self.model = load(transformer, head=False, **options)
        if not hasattr(self.model, "forward_packed"):
            raise CheckpointError(f"{transformer}: {type(self.model).__module__} has no encoder of its own")
        self.last = build_last(last, self.model.config.hidden_size * len(self.pooling)).to(device)
        path = transformer / "tokenizer_config.json"  # of which transformers reads more
        self.tokenizer_config = read_json(path) if path.is_file() else {}
        self.tokenizer, self.max_seq_length, self.lower_case = read_tokenizer(
            transformer, self.model, self.tokenizer_config
        )
        self.prompts, self.default_prompt_name, self.similarity_fn_name = read_settings(folder)

    def save(self, folder) -> None:
        """Writes a checkpoint that SentenceEncoder reads; `warpformer.save` writes the model of it.

        Raises:
            FileExistsError: the folder has a checkpoint of several files.
        """
        folder = Path(folder).expanduser()
        save(self.model, folder)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.tokenizer_config:
            write_json(folder / "tokenizer_config.json", self.tokenizer_config)
        settings = {"max_seq_length": self.max_seq_length, "do_lower_case": self.lower_case}
        write_json(folder / "sentence_bert_config.json", settings)
        width = self.model.config.hidden_size
        pooling = {"word_embedding_dimension": width, "pooling_mode": self.pooling}
        write_json(folder / "1_Pooling/config.json", pooling)
        settings = {key: getattr(self, key) for key in SETTINGS}
        write_json(folder / "config_sentence_transformers.json", settings)
        kinds = ["Transformer", "Pooling", *(type(module).__name__ for module in self.last)]
        for i, module in enumerate(self.last, 2):
            if isinstance(module, Dense):
                module.save(folder / f"{i}_Dense")
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        write_json(folder / "modules.json", modules)

    def get_embedding_dimension(self) -> int:
        dense = [module.linear.out_features for module in self.last if isinstance(module, Dense)]
        return dense[-1] if dense else self.model.config.hidden_size * len(self.pooling)

    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Embeddings of sentences.

        Args:
            sentences: texts, or one text. An empty text is its special tokens alone.
            prompt_name: which of `prompts` to put before each; the checkpoint's default if None.
            prompt: text to put before each, instead of a named one.
            batch_size: most sentences of a step. They are sorted by length and packed without padding: the
                result does not depend on it. On the CPU a step also ends at some 1536 tokens, and every
                thread of torch's takes steps of its own.
            show_progress_bar: if None, where there are several batches and stderr is a terminal.
            convert_to_numpy: an array; else a list of tensors.
            convert_to_tensor: one tensor, whatever convert_to_numpy says.
            normalize_embeddings: scales each to length 1.
            truncate_dim: keeps the first dimensions only.

        Returns:
            [sentences, dimension] float32, or [dimension] for one text.

        Raises:
            TypeError: an input is not a text.
            ValueError: unknown prompt_name, batch_size or truncate_dim below 1.
        """
        single = isinstance(sentences, str)
        texts = [sentences] if single else list(sentences)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"sentences must be strings, one is {type(text).__name__}")
        if batch_size < 1 or (truncate_dim is not None and truncate_dim < 1):
            raise ValueError(
                f"batch_size = {batch_size} and truncate_dim = {truncate_dim} must be at least 1"
            )
        before = self._prompt(prompt_name, prompt)
        rows = np.empty((len(texts), self.get_embedding_dimension()), np.float32)
        if show_progress_bar is None:
            show_progress_bar = len(texts) > batch_size and sys.stderr.isatty()
        with tqdm(total=len(texts), desc="Encoding", unit="sentence", disable=not show_progress_bar) as bar:
            for chosen, embeddings in self._embed_all(texts, before, batch_size):
                rows[chosen] = embeddings.cpu()  # by numpy: torch would wake threads that then spin
                bar.update(len(chosen))
        rows = torch.from_numpy(rows[:, :truncate_dim])
        if normalize_embeddings:
            rows = F.normalize(rows, dim=1)
        result = rows[0] if single else rows
        if convert_to_tensor:
            return result
        if convert_to_numpy:
            return result.numpy()
        return result if single else [*result]

    def similarity(self, embeddings1, embeddings2) -> Tensor:
        """Similarity of every row of one to every row of the other: [a, b] float32.

        Args:
            embeddings1, embeddings2: [a, C] and [b, C], or [C]: tensors, arrays, or lists of them.

        cosine: x.y / |x||y|; dot: x.y; euclidean: -|x - y|; manhattan: -sum |x - y|.
        """
        a, b = as_rows(embeddings1), as_rows(embeddings2)
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"embeddings of {a.shape[1]} and {b.shape[1]} dimensions cannot be compared")
        if self.similarity_fn_name == "cosine":
            return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
        if self.similarity_fn_name == "dot":
            return a @ b.T
        return -torch.cdist(a, b, p=2.0 if self.similarity_fn_name == "euclidean" else 1.0)

    def _prompt(self, name, prompt):
        if prompt is not None:
            return prompt
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"prompt_name = {name!r} is none of {[*self.prompts]}")
        return self.prompts[name]

    def _embed_all(self, texts, prompt, batch_size):
        """Indices and embeddings of the sentences of each step."""
        threads = self._threads(len(texts))
        steps = self._steps(texts, prompt, batch_size, threads)
        if threads == 1:
            for chosen, tokens in steps:
                yield chosen, self._embed(tokens)
            return
        # Threads that shared a step would wait for each other at every layer.
        with ThreadPoolExecutor(threads, initializer=run_on_one_thread) as pool:
            started = deque()
            for chosen, tokens in steps:
                started.append((chosen, pool.submit(self._embed, tokens)))
                if len(started) > 2 * threads:
                    chosen, embeddings = started.popleft()
                    yield chosen, embeddings.result()
            for chosen, embeddings in started:
                yield chosen, embeddings.result()

    @torch.inference_mode()
    def _threads(self, count):
        """How many threads take steps of their own; 1 where what torch keeps for each thread is in use:
        autocast, modes, profilers."""
        weight = next(self.model.parameters())
        threads = torch.get_num_threads()
        if count <= SHARED_TEXTS * threads or not weight.is_cpu:
            return 1
        return threads if is_direct(weight) and autocast_dtype(weight) is None else 1

    def _steps(self, texts, prompt, batch_size, threads):
        """The sentences that are embedded together: their indices, and the token ids of each. On the CPU the
        last steps are shorter, so that all threads end at about the same time."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(self.max_seq_length)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        ahead = max(READ_AHEAD, batch_size)
        on_cpu = next(self.model.parameters()).is_cpu
        for begin in range(0, len(order), ahead):
            chosen = order[begin : begin + ahead]
            tokens = self._tokenize([prompt + texts[i] for i in chosen])
            is_last = threads > 1 and begin + ahead >= len(order)
            left = sum(map(len, tokens)) if is_last else sys.maxsize
            start = count = 0
            for i, ids in enumerate(tokens, 1):
                count += len(ids)
                enough = max(LAST_TOKENS, min(CPU_TOKENS, left / (2 * threads))) if on_cpu else sys.maxsize
                if count >= enough or i in (start + batch_size, len(tokens)):
                    yield chosen[start:i], tokens[start:i]
                    left -= count
                    start, count = i, 0

    def _tokenize(self, texts):
        if self.lower_case:
            texts = [text.lower() for text in texts]
        return [np.array(encoding.ids, np.int32) for encoding in self.tokenizer.encode_batch_fast(texts)]

    @torch.inference_mode()
    def _embed(self, tokens: list[np.ndarray]) -> Tensor:
        lengths = [len(ids) for ids in tokens]
        ends = np.cumsum([0, *lengths], dtype=np.int32)
        positions = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends[:-1], lengths)
        device = next(self.model.parameters()).device
        ids, cu_seqlens, positions = (
            torch.from_numpy(a).to(device) for a in (np.concatenate(tokens), ends, positions)
        )
        sequences = Sequences.of_lengths(cu_seqlens, positions, max(lengths))
        hidden = self.model.forward_packed(ids, sequences).float()
        return self.last(torch.cat([pool(hidden, cu_seqlens, mode) for mode in self.pooling], dim=1))


class Normalize(nn.Module):
    """Scales embeddings to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


class Dense(nn.Module):
    """activation(linear(x)), in float32; `config` are the fields of its config.json."""

    def __init__(self, linear: PackedLinear, activation: str, config: dict):
        super().__init__()
        self.linear = linear
        self.activation = activation
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, activation=self.activation)

    def save(self, folder: Path) -> None:
        write_json(folder / "config.json", self.config)
        tensors = {f"linear.{key}": value for key, value in self.linear.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_dense(folder: Path, width: int) -> Dense:
    """The one in a folder, of embeddings of so many dimensions."""
    path = folder / "config.json"
    config = read_json(path)
    names = {config.get(key) for key in ("module_input_name", "module_output_name")}
    if names - {None, "sentence_embedding"} or config.get("use_residual"):
        raise CheckpointError(f"{path}: use_residual and names of inputs and outputs are not supported")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[-1]
    if name not in DENSE_ACTIVATIONS:
        raise CheckpointError(f"{path}: activation_function = {name!r:.80} is none of {[*DENSE_ACTIVATIONS]}")
    tensors = open_tensors(folder)
    rows = config.get("out_features")
    shapes = {"linear.weight": (rows, width)} | ({"linear.bias": (rows,)} if config.get("bias", True) else {})
    for key, shape in shapes.items():
        found = tensors.get(key)
        if found is None or found.shape != shape or found.dtype not in FLOATS:
            is_there = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise CheckpointError(f"{folder}: {key!r} of {list(shape)} floats is {is_there}")
    weight, *biases = (tensors[key].read().to(torch.float32, copy=True) for key in shapes)
    bias = nn.Parameter(biases[0], requires_grad=False) if biases else None
    return Dense(PackedLinear.of(weight, bias), DENSE_ACTIVATIONS[name], config)


def build_last(places: list[Path | None], width: int) -> nn.Sequential:
    """What comes after pooling: a Dense for each folder, Normalize for each None."""
    modules = nn.Sequential()
    for place in places:
        modules.append(Normalize() if place is None else read_dense(place, width))
        width = width if place is None else modules[-1].linear.out_features
    return modules


def run_on_one_thread():
    """Makes one thread the number of torch's and ours for calls from this one."""
    torch.get_num_threads()  # torch sets it at its first use
    _C.set_own_threads(1)


def pool(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """One vector for each packed sequence: [N, C] and [sequences + 1] -> [sequences, C]; 0 where it is empty.

    Source: sentence_transformers' Pooling.
    """
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    lengths = ends - starts
    if mode in ("cls", "lasttoken"):
        out = hidden.new_zeros(len(lengths), hidden.shape[1])
        some = lengths > 0
        out[some] = hidden[(starts if mode == "cls" else ends - 1)[some]]
        return out
    every = torch.arange(len(hidden), dtype=starts.dtype, device=hidden.device)
    if mode in ("mean", "max"):
        return F.embedding_bag(every, hidden, starts, mode=mode)
    if mode == "mean_sqrt_len_tokens":
        weight, divisor = None, lengths.sqrt()
    else:  # weightedmean: token i of n counts i + 1 times
        weight = (every + 1 - starts.repeat_interleave(lengths)).float()
        divisor = lengths * (lengths + 1) / 2
    total = F.embedding_bag(every, hidden, starts, mode="sum", per_sample_weights=weight)
    return total / divisor.clamp(min=1)[:, None]


def read_modules(folder: Path):
    """The transformer's folder, the pooling modes, and what comes after it: the folder of each Dense, None
    for a Normalize."""
    path = folder / "modules.json"
    if not path.is_file():
        return folder, ["mean"], []
    transformer, pooling, last = None, None, []
    for module in read_json(path, list):
        kind = str(module.get("type", "")) if type(module) is dict else ""
        place = module.get("path", "") if kind else ""
        if type(place) is not str or Path(place).is_absolute() or ".." in Path(place).parts:
            raise CheckpointError(f"{path} names a folder outside its own: {place!r}")
        match kind.rsplit(".", 1)[-1]:
            case "Transformer" if transformer is None:
                transformer = folder / place
            case "Pooling" if transformer is not None and pooling is None:
                pooling = read_pooling(folder / place / "config.json")
            case "Dense" if pooling is not None:
                last.append(folder / place)
            case "Normalize" if pooling is not None:
                last.append(None)
            case _:
                raise CheckpointError(
                    f"{path}: the module {kind!r} is not supported there: Transformer, Pooling, and then "
                    "Dense and Normalize are"
                )
    if pooling is None:
        raise CheckpointError(f"{path} has no Transformer followed by Pooling")
    return transformer, pooling, last


def read_pooling(path: Path) -> list[str]:
    config = read_json(path)
    flags = {
        "cls_token": "cls",
        "max_tokens": "max",
        "mean_tokens": "mean",
        "weightedmean_tokens": "weightedmean",
    }
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        modes = [modes] if type(modes) is str else modes
    else:
        on = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
        on = [flags.get(key, key) for key in on]
        modes = [mode for mode in POOLING_MODES if mode in on]
    if type(modes) is not list or not modes or any(mode not in POOLING_MODES for mode in modes):
        raise CheckpointError(f"{path}: pooling modes {modes!r:.80} are not among {POOLING_MODES}")
    if config.get("include_prompt", True) is not True:
        raise CheckpointError(f"{path}: include_prompt = false is not supported")
    return modes


def read_tokenizer(folder: Path, model, tokenizer_config: dict):
    """The tokenizer, the tokens it may make of a sentence, and whether to lower-case before it."""
    tokenizer = open_tokenizer(folder)
    # The file's name was once that of the architecture.
    paths = sorted(folder.glob("sentence_*_config.json"), key=lambda path: "_bert_" not in path.name)
    settings = read_json(paths[0]) if paths else {}
    longest = settings.get("max_seq_length")
    if longest is None:
        longest = tokenizer_config.get("model_max_length", UNLIMITED)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if type(longest) is not int or longest <= special:
        raise CheckpointError(f"{folder}: max_seq_length = {longest!r:.80} leaves no room for a token")
    positions = getattr(model.config, "max_length", UNLIMITED)  # those of T5 have no end
    return tokenizer, min(longest, positions), settings.get("do_lower_case") is True


def read_settings(folder: Path):
    path = folder / "config_sentence_transformers.json"
    values = read_json(path) if path.is_file() else {}
    prompts = values.get("prompts") or {}
    if type(prompts) is not dict or not all(type(text) is str for text in prompts.values()):
        raise CheckpointError(f"{path}: prompts is not an object of texts")
    default = values.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{path}: default_prompt_name = {default!r:.80} is none of {[*prompts]}")
    similarity = values.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(f"{path}: similarity_fn_name = {similarity!r:.80} is none of {SIMILARITIES}")
    return prompts, default, similarity


def as_rows(embeddings) -> Tensor:
    if isinstance(embeddings, list | tuple):
        embeddings = torch.stack([torch.as_tensor(row) for row in embeddings])
    rows = torch.as_tensor(embeddings, dtype=torch.float32)
    return rows[None] if rows.ndim == 1 else rows
