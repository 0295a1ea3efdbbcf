"""The options of `generate`, under the names of transformers' GenerationConfig."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from warpformer._C import InputError

OF_MODEL = ("eos_token_id", "pad_token_id", "decoder_start_token_id")  # in config.json, too
OF_SAMPLING = ("temperature", "top_k", "top_p")
OF_BEAMS = ("length_penalty", "early_stopping")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How `generate` chooses tokens, and when it stops.

    Args:
        max_new_tokens: of a row, the end-of-sequence token included.
        do_sample: draw tokens from the model's distribution; else take the likeliest.
        temperature: divides the logits. Below 1 likely tokens become likelier.
        top_k: draw among the k likeliest tokens alone.
        top_p: draw among the likeliest tokens alone whose probabilities reach p together.
        num_beams: of a beam search; 1 for none.
        length_penalty: a beam of n new tokens is worth (its log-probability) / n ** length_penalty.
        early_stopping: True: a row ends when num_beams of its beams have ended. False: when no running beam
            is worth more than the worst of those, at the present length. "never": nor at any later length.
        eos_token_id: the token, or the tokens, that end a row.
        pad_token_id: what stands behind the end of a row; the first eos_token_id if None.
        decoder_start_token_id: what the decoder of an encoder-decoder model reads first.

    Ids that are None are those of the model's config.json, and rows without any eos_token_id end at
    max_new_tokens.

    Raises:
        InputError: a value is out of its range, or an option has no meaning beside the others.

    Source: transformers.GenerationConfig.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "num_beams", "top_k"):
            value = getattr(self, name)
            require(
                value is None or (is_integer(value) and value > 0),
                f"{name} = {value!r} is no count from 1 on",
            )
        temperature, top_p = self.temperature, self.top_p
        require(0 < temperature < float("inf"), f"temperature = {temperature!r} is not a number above 0")
        require(top_p is None or 0 < top_p <= 1, f"top_p = {top_p!r} is not above 0 and at most 1")
        require(
            abs(self.length_penalty) < float("inf"), f"length_penalty = {self.length_penalty} is not finite"
        )
        require(
            self.early_stopping in (False, True, "never"),
            f"early_stopping = {self.early_stopping!r} is none of False, True and 'never'",
        )
        require(not self.do_sample or self.num_beams == 1, "do_sample and num_beams > 1 exclude each other")
        self._require_defaults(OF_SAMPLING, self.do_sample, "do_sample=True")
        self._require_defaults(OF_BEAMS, self.num_beams > 1, "num_beams > 1")
        for name in OF_MODEL:
            for token in as_tuple(getattr(self, name)):
                require(is_integer(token) and token >= 0, f"{name} = {token!r} is no token")

    def _require_defaults(self, names, used, why):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names:
                require(used or value == field.default, f"{field.name} = {value!r} counts with {why} alone")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return as_tuple(self.eos_token_id)

    @property
    def padding(self) -> int:
        """The token behind the end of a row: 0 where no row ends before others."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_ids[0] if self.eos_token_ids else 0


def require(condition, message):
    if not condition:
        raise InputError(f"generate: {message}")


def is_integer(value) -> bool:
    return type(value) is int


def as_tuple(value) -> tuple:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) else (value,)


def of_model(model, name):
    """A field of the model's config, or of the config.json that it was loaded by; None if there is none."""
    config = getattr(model, "config", None)
    value = getattr(config, name, None)
    return getattr(config, "source", {}).get(name) if value is None else value


def config_for(model, options: dict) -> GenerationConfig:
    """Of the options, and for the ids that are not among them of the model.

    Raises:
        TypeError: an option is not known.
    """
    known = [field.name for field in fields(GenerationConfig)]
    for name in options:
        if name not in known:
            raise TypeError(f"generate: {name!r} is none of {known}")
    ids = {name: of_model(model, name) for name in OF_MODEL if options.get(name) is None}
    return GenerationConfig(**options | ids)
