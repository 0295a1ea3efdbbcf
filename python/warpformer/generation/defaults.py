"""The options that a checkpoint brings: generation_config.json, and what older ones have in config.json."""

import logging
from collections.abc import Mapping
from dataclasses import fields

from warpformer.generation.checks import require
from warpformer.generation.config import OF_BEAMS, OF_LOOKUP, OF_SAMPLING, TOKENS, GenerationConfig

log = logging.getLogger("warpformer")
KNOWN = [field.name for field in fields(GenerationConfig)]
IDS = ("eos_token_id", "pad_token_id", "decoder_start_token_id")  # which a model has besides
UNKNOWN = (  # options of transformers that change tokens, and are none of ours
    "constraints",
    "dola_layers",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "guidance_scale",
    "penalty_alpha",
    "remove_invalid_values",
    "sequence_bias",
    "top_h",
    "watermarking_config",
)


def of_model(model, name):
    """A field of the model's generation_config or config, or of the config.json that it was loaded by; None
    if there is none."""
    config = getattr(model, "config", None)
    values = generation_config(model).get(name), getattr(config, name, None), source(config).get(name)
    return next((value for value in values if value is not None), None)


def generation_config(model) -> Mapping:
    """What generation_config.json has."""
    values = getattr(model, "generation_config", None)
    return values if isinstance(values, Mapping) else {}


def source(config) -> Mapping:
    """What config.json has."""
    return getattr(config, "source", None) or {}


def config_for(model, options: dict) -> GenerationConfig:
    """Of the options, and of those of the model for what is not among them.

    Raises:
        InputError: as GenerationConfig.
        TypeError: an option is not known.
    """
    for name in options:
        if name not in KNOWN:
            raise TypeError(f"generate: {name!r} is none of {KNOWN}")
    values = generation_config(model) or source(getattr(model, "config", None))
    found = {name: values.get(name) for name in KNOWN} | {name: of_model(model, name) for name in IDS}
    defaults = {name: value for name, value in found.items() if value is not None and name not in options}
    if defaults.get("pad_token_id") == -1:  # which some have for none
        del defaults["pad_token_id"]
    drop_contradicted(defaults, options)
    # A null, where an option has a default, is that default.
    given = {name: value for name, value in options.items() if value is not None}
    return GenerationConfig(**defaults, **given)


def drop_contradicted(defaults: dict, options: dict):
    """Takes out of a model's defaults what has no meaning beside the options of a call."""

    def value(name):
        return options.get(name, defaults.get(name))

    if (options.get("num_beams") or 1) > 1:
        defaults.pop("do_sample", None)
    if (options.get("num_beams") or 1) > 1 or not value("prompt_lookup_num_tokens"):
        for name in OF_LOOKUP:
            defaults.pop(name, None)
    if value("do_sample") or value("prompt_lookup_num_tokens"):
        for name in ("num_beams", *OF_BEAMS):
            defaults.pop(name, None)
    if not value("do_sample"):
        for name in OF_SAMPLING:
            defaults.pop(name, None)
    if (value("num_beams") or 1) == 1:
        for name in OF_BEAMS:
            defaults.pop(name, None)
    if options.get("max_new_tokens") or options.get("max_length"):
        for name in ("max_new_tokens", "max_length"):
            defaults.pop(name, None)
    elif "max_new_tokens" in defaults:  # as transformers has it
        defaults.pop("max_length", None)
    for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
        if value(most) and least in defaults and defaults[least] > value(most):
            del defaults[least]


def name_ignored(values: Mapping):
    """Warns of what a generation_config.json asks for, and what has no effect here."""
    for name in UNKNOWN:
        if values.get(name) not in (None, False, 0, 1, [], {}):
            log.warning("generation_config.json: %s = %.80r has no effect", name, values[name])


def check_tokens(config: GenerationConfig, vocabulary: int):
    """That every token of the options is one of the model."""
    for name in TOKENS:
        for token in config.tokens(name):
            require(token < vocabulary, f"{name} = {token} is not in the vocabulary of {vocabulary}")
