"""Where rows end: functions History -> [R] bool, that look at each row alone."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from tokenizers import Tokenizer
from torch import Tensor

from warpformer.generation.checks import as_tuple, require
from warpformer.generation.config import GenerationConfig
from warpformer.generation.history import PADDING, History

StoppingCriterion = Callable[..., Tensor | bool]  # of transformers, and of users
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a part of a character is decoded to


def stopping(
    config: GenerationConfig, users: Sequence[StoppingCriterion], tokenizer: Tokenizer | None
) -> list[Callable[[History], Tensor]]:
    """Those that the options ask for; lengths are not among them."""
    strings = as_tuple(config.stop_strings)
    require(not strings or tokenizer is not None, "stop_strings need a tokenizer")
    criteria = [partial(of_user, criterion=user, padding=config.padding) for user in users]
    if strings:
        criteria.insert(0, StopStrings(strings, tokenizer))
    if config.eos_token_ids:
        criteria.insert(0, partial(at_tokens, tokens=torch.tensor(config.eos_token_ids)))
    return criteria


def at_tokens(history: History, tokens: Tensor) -> Tensor:
    return (history.last == tokens.to(history.last.device)).any(1)


def of_user(history: History, criterion: StoppingCriterion, padding: int) -> Tensor:
    return torch.as_tensor(criterion(history.ids(padding), None), device=history.tokens.device)


class StopStrings:
    """Whether the last token of a row completes one of the texts, of which the prompt may have a part."""

    def __init__(self, strings: Sequence[str], tokenizer: Tokenizer):
        self.strings = strings
        self.tokenizer = tokenizer
        # Every token has a byte or more; those besides make up for what decoders do to the first ones.
        self.window = max(len(text.encode()) for text in strings) + 8

    def __call__(self, history: History) -> Tensor:
        tails = history.tokens[:, -self.window :].tolist()
        ends = [self.is_complete([token for token in tail if token != PADDING]) for tail in tails]
        return torch.tensor(ends, device=history.tokens.device)

    def is_complete(self, tail: list[int]) -> bool:
        text, before = self.text(tail), self.text(tail[:-1]).rstrip(INCOMPLETE)
        return any(stop in text and text.rfind(stop) + len(stop) > len(before) for stop in self.strings)

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)
