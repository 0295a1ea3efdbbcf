"""What a run of training is told, read from TOML: unknown keys and wrong types are errors."""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import get_args

from warpformer._C import InputError
from warpformer.training.schedule import SCHEDULES

AUTOCAST = ("bfloat16",)


@dataclass(kw_only=True)
class TrainConfig:
    """How to train: the section [train].

    Attributes:
        max_steps, max_epochs, max_minutes: where to stop, whichever comes first; one must be given.
        max_tokens: of a micro-batch, which each process computes at a time.
        accumulate: micro-batches of each process in a step; the last step of an epoch may have fewer.
        learning_rate: the highest.
        schedule: inverse_sqrt, cosine or constant; see `learning_rate`.
        warmup_steps: in which the learning rate grows from 0.
        betas, eps: of AdamW.
        weight_decay: of AdamW, for matrices and tables; biases and the weights of norms have none.
        clip: the largest norm of the gradient of all parameters together; 0 for any.
        autocast: "bfloat16" for products in it, with parameters and sums in float32.
        seed: of everything random.
        eval_every: steps between losses of the validation data.
        save_every: steps between checkpoints.
        patience: stop after so many evaluations in a row without a new lowest loss.
        tensorboard: whether to write a log for it, too.
    """

    max_steps: int | None = None
    max_epochs: int | None = None
    max_minutes: float | None = None
    max_tokens: int = 4096
    accumulate: int = 1
    learning_rate: float = 1e-3
    schedule: str = "inverse_sqrt"
    warmup_steps: int = 400
    betas: list = (0.9, 0.98)
    eps: float = 1e-9
    weight_decay: float = 0.01
    clip: float = 1.0
    autocast: str | None = None
    seed: int = 0
    eval_every: int = 500
    save_every: int = 500
    patience: int | None = None
    tensorboard: bool = False

    def __post_init__(self):
        self.betas = [*self.betas]
        limits = (self.max_steps, self.max_epochs, self.max_minutes)
        require(any(limits), "one of max_steps, max_epochs and max_minutes must be given")
        for name in ("max_steps", "max_epochs", "max_minutes", "patience"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} = {value} is not positive")
        for name in ("max_tokens", "accumulate", "learning_rate", "eps", "eval_every", "save_every"):
            require(getattr(self, name) > 0, f"{name} = {getattr(self, name)} is not positive")
        for name in ("warmup_steps", "weight_decay", "clip", "seed"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)} is negative")
        require(self.schedule in SCHEDULES, f"schedule = {self.schedule!r} is none of {[*SCHEDULES]}")
        require(self.schedule != "cosine" or self.max_steps, "schedule = 'cosine' needs max_steps")
        require(
            self.autocast is None or self.autocast in AUTOCAST,
            f"autocast = {self.autocast!r} is none of {[*AUTOCAST]}",
        )
        require(
            len(self.betas) == 2 and all(type(b) is float and 0 <= b < 1 for b in self.betas),
            f"betas = {self.betas} are not two numbers in [0, 1)",
        )

    # What a resumed run may change, for it changes no step of those before.
    FREE = ("max_epochs", "max_minutes", "save_every", "patience", "tensorboard")

    def free(self) -> tuple[str, ...]:
        """The names of what a resumed run may change: limits, and what is no part of the computation."""
        return self.FREE if self.schedule == "cosine" else (*self.FREE, "max_steps")


def require(condition, message: str):
    if not condition:
        raise InputError(f"[train] {message}")


def check_keys(section: str, given: Iterable[str], known: Iterable[str]):
    """Raises an InputError that names the keys that are not known, and those that are."""
    known = sorted(known)
    unknown = sorted(set(given).difference(known))
    if unknown:
        raise InputError(f"[{section}] has no {', '.join(unknown)}; its keys are {', '.join(known)}")


def read_section(cls, section: str, values: dict):
    """A dataclass of the values of a section of TOML, all of whose keys and types are its fields'."""
    if type(values) is not dict:
        raise InputError(f"[{section}] is no section, but {values!r:.80}")
    check_keys(section, values, (field.name for field in fields(cls)))
    chosen = {}
    for field in fields(cls):
        if field.name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise InputError(f"[{section}] needs {field.name}")
            continue
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        value = values[field.name]
        if float in kinds and type(value) is int:
            value = float(value)
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
            raise InputError(f"[{section}] {field.name} = {value!r:.80} is not of type {names}")
        chosen[field.name] = value
    return cls(**chosen)
