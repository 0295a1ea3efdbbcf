"""What values options may have."""

from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Real

from warpformer._C import InputError


def require(condition, message):
    if not condition:
        raise InputError(f"generate: {message}")


def is_integer(value) -> bool:
    return type(value) is int


def is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def as_tuple(value) -> tuple:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)


def is_count(value, least: int = 0) -> bool:
    return is_integer(value) and value >= least


def is_none_or(allows: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or allows(value)


def are_texts(value) -> bool:
    return all(type(text) is str and text for text in as_tuple(value))


def are_words(value) -> bool:
    words = as_tuple(value)
    return all(isinstance(word, Sequence) and not isinstance(word, str) and len(word) for word in words)


ALLOWED = (
    (
        "max_new_tokens max_length prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens",
        is_none_or(lambda value: is_count(value, 1)),
        "None or 1, 2...",
    ),
    ("num_beams num_beam_groups num_return_sequences", lambda value: is_count(value, 1), "1, 2..."),
    ("min_length min_new_tokens no_repeat_ngram_size", is_count, "0, 1, 2..."),
    ("top_k", is_none_or(is_count), "None or 0, 1, 2..."),
    (
        "temperature repetition_penalty patience",
        lambda value: is_number(value) and value > 0,
        "a number above 0",
    ),
    (
        "top_p typical_p",
        is_none_or(lambda value: is_number(value) and 0 < value <= 1),
        "above 0 and at most 1",
    ),
    ("min_p", is_none_or(lambda value: is_number(value) and 0 <= value <= 1), "a number from 0 to 1"),
    ("frequency_penalty presence_penalty length_penalty", is_number, "a finite number"),
    ("diversity_penalty", lambda value: is_number(value) and value >= 0, "a finite number from 0 on"),
    (
        "do_sample renormalize_logits return_dict_in_generate",
        lambda value: type(value) is bool,
        "True or False",
    ),
    ("early_stopping", lambda value: value in (False, True, "never"), "True, False or 'never'"),
    ("stop_strings", are_texts, "a text or texts, none of them empty"),
    ("bad_words_ids", are_words, "a list of lists of tokens, none of them empty"),
)
