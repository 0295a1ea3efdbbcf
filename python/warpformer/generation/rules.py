from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from warpformer.generation.bans import Ban
from warpformer.generation.config import GenerationConfig
from warpformer.generation.constraint import Constraint
from warpformer.generation.history import History
from warpformer.generation.processors import LogitsProcessor, processors
from warpformer.generation.stopping import StoppingCriterion, stopping


class Rules:
    """What a call of `generate` has asked for, of every step: which scores tokens get, and where rows end.

    Args:
        users: LogitsProcessors of the user.
        criteria: StoppingCriteria of the user.
        tokenizer: for stop_strings.
        constraint: which new tokens follow.
    """

    def __init__(
        self,
        config: GenerationConfig,
        users: Sequence[LogitsProcessor] = (),
        criteria: Sequence[StoppingCriterion] = (),
        tokenizer: Tokenizer | None = None,
        constraint: Constraint | None = None,
    ):
        self.config = config
        self.processors = processors(config, users, constraint)
        self.stopping = stopping(config, criteria, tokenizer)
        self._eos = frozenset(config.eos_token_ids)
        self._changed: Tensor | None = None
        self._looks_at_texts = len(self.stopping) > bool(self._eos)

    @property
    def bans(self) -> list[Ban] | None:
        """The processors, if all of them are bans."""
        return self.processors if all(isinstance(each, Ban) for each in self.processors) else None

    def scores(self, history: History, scores: Tensor) -> Tensor:
        """[R, V] of logits or log-probabilities [R, V] of the next tokens. Where an option changes them they
        are float32, good until the next call, and where those of the call before were."""
        if not self.processors:
            return scores
        if self._changed is None or self._changed.shape != scores.shape:
            self._changed = torch.empty_like(scores, dtype=torch.float32)
        changed = self._changed.copy_(scores)
        for processor in self.processors:
            changed = processor(history, changed)
        return changed

    def ends(self, history: History) -> Tensor:
        """[R] whether rows end with the token that they have last."""
        return self._any_of(history.lengths >= history.limits, history)

    def may_end(self, history: History) -> bool:
        """False where no row ends, as the host knows without much ado."""
        if self._looks_at_texts or history.room <= 0:
            return True
        return bool(self._eos) and not self._eos.isdisjoint(history.last.flatten().tolist())

    def stops(self, history: History) -> Tensor:
        """[R] whether anything but their lengths ends them."""
        return self._any_of(torch.zeros_like(history.lengths, dtype=torch.bool), history)

    def _any_of(self, ends, history):
        for criterion in self.stopping:
            ends = ends | criterion(history)
        return ends
