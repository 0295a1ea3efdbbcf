"""From a file of TOML to a trained model: what `warpformer train` does."""

import inspect
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from warpformer._C import InputError, __version__
from warpformer.checkpoint import read_json
from warpformer.load import build, model_module
from warpformer.models._config import CheckpointError
from warpformer.models._init import init_
from warpformer.models._seq2seq import Seq2Seq
from warpformer.save import write_json
from warpformer.training import OBJECTIVES, distributed
from warpformer.training.checkpoint import check_identity, sha256
from warpformer.training.config import TrainConfig, check_keys, read_section
from warpformer.training.objectives.objective import Objective
from warpformer.training.text import Texts, read_texts
from warpformer.training.tokenizer import train_tokenizer
from warpformer.training.trainer import Result, Trainer, log

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ABOUT = "train.json"
OF = ("train", "valid")  # what there are texts of
INITIALIZER_RANGE = 0.02  # of models that do not say otherwise, as in BERT and GPT-2
GIVEN = ("texts", "tokenizer", "max_length", "seed")  # to objectives, by other sections


@dataclass(kw_only=True)
class TokenizerConfig:
    """The section [tokenizer]: the file of one, or how large one to train on the texts.

    Attributes:
        path: a tokenizer.json with `<pad>`, `<s>`, `</s>`, `<unk>` and `<mask>`.
        vocab_size, sentinels: as in `train_tokenizer`.
    """

    path: str | None = None
    vocab_size: int | None = None
    sentinels: int = 0

    def __post_init__(self):
        if (self.path is None) == (self.vocab_size is None):
            raise InputError("[tokenizer] needs one of path and vocab_size")


@dataclass(kw_only=True)
class DataConfig:
    """The section [data].

    Attributes:
        train, valid: files, as `read_texts` reads them.
        columns: of them.
        max_length: most tokens of a sequence.
    """

    train: str
    valid: str | None = None
    columns: list | None = None
    max_length: int

    def __post_init__(self):
        if self.columns is not None and not all(type(column) is int for column in self.columns):
            raise InputError(f"[data] columns = {self.columns} are no numbers")
        if self.max_length < 1:
            raise InputError(f"[data] max_length = {self.max_length} is not positive")


@dataclass(kw_only=True)
class RunConfig:
    """A file of `warpformer train`. Its paths are relative to its folder.

    Attributes:
        out: the folder of the run.
        device: cpu or cuda.
        model: fields of config.json, with model_type; vocab_size and the ids of special tokens are those of
            the tokenizer where they are not given. initializer_range: standard deviation of the matrices and
            tables of a model that does not initialize itself.
        objective: name, one of OBJECTIVES, and its options.
        tokenizer, data, train: sections.
    """

    out: str
    device: str = "cpu"
    model: dict
    tokenizer: dict
    data: dict
    objective: dict
    train: dict

    def __post_init__(self):
        self.tokenizer = read_section(TokenizerConfig, "tokenizer", self.tokenizer)
        self.data = read_section(DataConfig, "data", self.data)
        self.train = read_section(TrainConfig, "train", self.train)
        if self.device not in ("cpu", "cuda"):
            raise InputError(f"device = {self.device!r} is neither cpu nor cuda")
        name = self.objective.get("name")
        if name not in OBJECTIVES:
            raise InputError(f"[objective] name = {name!r} is none of {[*OBJECTIVES]}")
        check_options(name, self.objective)


def read_run_config(path) -> RunConfig:
    """The file at `path`.

    Raises:
        InputError: it is no TOML, a key is not known or missing, a value has the wrong type.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    try:
        config = read_section(RunConfig, "", values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    config.out = str(path.parent / Path(config.out).expanduser())
    for section, name in ((config.data, "train"), (config.data, "valid"), (config.tokenizer, "path")):
        if (value := getattr(section, name)) is not None:
            setattr(section, name, str(path.parent / Path(value).expanduser()))
    return config


def check_options(name: str, values: dict):
    """That the options of an objective are those of its constructor, of the types of their defaults."""
    options = {
        option.name: option.default
        for cls in OBJECTIVES[name].__mro__
        for option in inspect.signature(cls.__init__).parameters.values()
        if option.kind is option.KEYWORD_ONLY and option.name not in GIVEN
    }
    check_keys("objective", values, [*options, "name"])
    for key, value in values.items():
        default = options.get(key)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if isinstance(default, bool | int | float | str) and type(value) is not type(default):
            raise InputError(f"[objective] {key} = {value!r:.80} is not of type {type(default).__name__}")


def train(config: RunConfig, *, resume: bool = False) -> Result:
    """Trains the model of a configuration in the folder config.out, which then is one that `wf.load` reads,
    with tokenizer.json, log.csv, loss.png and train.json: configuration, time and tokens, the lowest loss.

    Args:
        resume: go on with the run in that folder; one that has no checkpoint yet begins anew.

    Raises:
        FileExistsError: the folder is of a run, and `resume` is false; or it has other files.
        FileNotFoundError: there is no run to resume; a file is missing.
        CheckpointError: the run there has another configuration, or its checkpoint does not fit.
        InputError: something of the configuration cannot be.
    """
    with distributed.process_group(config.device) as device:
        return train_on(device, config, resume)


def train_on(device: torch.device, config: RunConfig, resume: bool) -> Result:
    """`train` in one process of the group; what it makes is gone when the group ends."""
    out = Path(config.out)
    about = {
        "config": asdict(config),
        "files": {name: sha256(path) for name, path in paths(config.data).items()},
        "versions": {"warpformer": __version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
    }
    check_folder(out, about, config.train.free(), resume)
    texts = [read(config.data, path) for path in paths(config.data).values()]
    tokenizer = make_tokenizer(config.tokenizer, texts[0])
    objectives = [make_objective(config, *of, tokenizer) for of in zip(OF, texts, strict=False)]
    model = make_model(config, objectives[0], tokenizer).to(device)
    valid = objectives[1] if len(objectives) > 1 else None
    trainer = Trainer(model, objectives[0], config.train, out, valid=valid)
    if resume:
        log.info("%s: after step %d", out, trainer.resume())
    about |= {"processes": distributed.world(), "parameters": count_parameters(model)}
    if distributed.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / "tokenizer.json"))
        write_json(out / ABOUT, about)
    result = trainer.train()
    if distributed.rank() == 0:
        write_json(out / ABOUT, about | {"result": asdict(result)})
    return result


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def paths(data: DataConfig) -> dict[str, str]:
    return {name: getattr(data, name) for name in OF if getattr(data, name) is not None}


def check_folder(out: Path, about: dict, free: tuple[str, ...], resume: bool):
    """That a run may begin in a folder, or go on."""
    path = out / ABOUT
    if resume:
        found = read_json(path)
        if not all(type(found.get(name)) is dict for name in ("config", "files")):
            raise CheckpointError(f"{path} has no config or files")
        check_identity(path, identity(found), identity(about), free)
    elif path.exists():
        raise FileExistsError(f"{out} holds a run: resume it, or choose another folder")
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    distributed.total(0)  # all have looked before one writes


def identity(about: dict) -> dict:
    """What makes a run this one: not where its files are, but what they hold."""
    config = {name: value for name, value in about["config"].items() if name != "out"}
    for section, names in (("data", OF), ("tokenizer", ("path",))):
        config[section] = {key: value for key, value in config[section].items() if key not in names}
    return config | {"files": about["files"]}


def read(data: DataConfig, path: str) -> Texts:
    texts = read_texts(path, data.columns)
    if texts.lines:
        log.warning("%s", texts.report())
    return texts


def make_tokenizer(config: TokenizerConfig, texts: Texts) -> Tokenizer:
    """The same in all processes: one trains it."""
    if config.path is None:
        rows = (text for row in texts.rows for text in row)
        return Tokenizer.from_str(
            distributed.from_first(
                lambda: train_tokenizer(rows, config.vocab_size, sentinels=config.sentinels).to_str()
            )
        )
    path = Path(config.path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # it raises no other
        raise InputError(f"{path} is no tokenizer.json: {error}") from error


def make_objective(config: RunConfig, of: str, texts: Texts, tokenizer: Tokenizer) -> Objective:
    """That of the texts to train on or to evaluate on, the latter without label smoothing."""
    options = {key: value for key, value in config.objective.items() if key != "name"}
    options |= {"label_smoothing": 0.0} if of == "valid" else {}
    objective = OBJECTIVES[config.objective["name"]](
        texts, tokenizer, max_length=config.data.max_length, seed=config.train.seed, **options
    )
    for reason, count in objective.skipped.items():
        log.warning("%s: %d left out: %s", texts.path, count, reason)
    return objective


def make_model(config: RunConfig, objective: Objective, tokenizer: Tokenizer) -> nn.Module:
    """A new model of the section [model], its parameters by the seed."""
    values = {"vocab_size": tokenizer.get_vocab_size()} | objective.token_ids | config.model
    try:
        module = model_module(values)
    except CheckpointError as error:
        raise InputError(f"[model] {error}") from error
    known = {field.name for field in fields(module.Config)}
    names = ("model_type", "architectures", "initializer_range")
    check_keys("model", config.model, {*known, *objective.token_ids, *names})
    for name, value in objective.token_ids.items():
        if values[name] != value:
            raise InputError(f"[model] {name} = {values[name]!r:.80}, but the tokenizer makes it {value}")
    size, tokens = values["vocab_size"], tokenizer.get_vocab_size()
    if type(size) is int and size < tokens:
        raise InputError(f"[model] vocab_size = {size} is below the tokenizer's {tokens}")
    torch.manual_seed(config.train.seed)
    try:
        model = build(module, values)
    except CheckpointError as error:
        raise InputError(f"[model] {error}") from error
    if not isinstance(getattr(model, "backbone", model), Seq2Seq):  # those initialize themselves
        init_(model, values.get("initializer_range", INITIALIZER_RANGE))
    longest = getattr(model.config, "max_length", None)
    if longest is not None and config.data.max_length > longest:
        raise InputError(f"[data] max_length = {config.data.max_length} is above the model's {longest}")
    model.config.source = values
    return model
