from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from warpformer.generation.bans import Ban
from warpformer.generation.config import GenerationConfig
from warpformer.generation.constraint import Constraint
from warpformer.generation.history import History
from warpformer.generation.processors import LogitsProcessor, penalized, penalty_options, processors
from warpformer.generation.sampling import Greedy, Sampler, Written, sampling_options
from warpformer.generation.stopping import StoppingCriterion, stopping


class Rules:
    """What a call of `generate` has asked for, of every step: which scores tokens get, and where rows end.

    Args:
        users: LogitsProcessors of the user.
        criteria: StoppingCriteria of the user.
        tokenizer: for stop_strings.
        constraint: which new tokens follow.

    Attributes:
        processors: what changes the scores of a step before a token is chosen, in order.
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
        self._penalties = penalty_options(config)  # of the choice
        if self._penalties and (config.num_beams > 1 or self.bans is None):  # others look at what they make
            self.processors.insert(0, partial(penalized, options=self._penalties))
            self._penalties = {}
        self.stopping = stopping(config, criteria, tokenizer)
        self._eos = frozenset(config.eos_token_ids)
        self._changed: Tensor | None = None
        self._looks_at_texts = len(self.stopping) > bool(self._eos)

    @property
    def bans(self) -> list[Ban] | None:
        """The processors, if all of them are bans."""
        return self.processors if all(isinstance(each, Ban) for each in self.processors) else None

    @property
    def follow_the_text(self) -> bool:
        """Whether the choice of a token depends on more than logits."""
        return bool(self.processors or self._penalties)

    def chooser(self, seeds: np.ndarray | None) -> Greedy | Sampler:
        """What chooses tokens by the scores: the best one, or one that is drawn where there are `seeds`."""
        if seeds is None:
            return Greedy(self._penalties)
        return Sampler(seeds, sampling_options(self.config) | self._penalties)

    def written(self, history: History) -> Written:
        """What it looks at besides: nothing, or what stands in the rows already."""
        return history.written if self._penalties else ()

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
