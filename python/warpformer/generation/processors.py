"""The way from the logits of a step to its scores: functions (History, scores [R, V]) -> scores [R, V].

They look at each row alone and keep no state, so that rows may join and leave a batch. Scores are float32,
and theirs to change.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from warpformer import ops
from warpformer.generation import bans
from warpformer.generation.bans import Ban
from warpformer.generation.config import GenerationConfig
from warpformer.generation.constraint import Constraint
from warpformer.generation.history import History

Processor = Callable[[History, Tensor], Tensor]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # of transformers, and of users


def processors(
    config: GenerationConfig, users: Sequence[LogitsProcessor] = (), constraint: Constraint | None = None
) -> list[Processor]:
    """Those that the options ask for, in the order of transformers, without the penalties before them. What a
    draw is made among is told to `ops.sample`."""
    c, eos = config, config.eos_token_ids
    chain = [
        c.no_repeat_ngram_size > 0 and partial(bans.repeated_ngrams, size=c.no_repeat_ngram_size),
        *map(bans.ban_of_words, bans.by_length(c.bad_words_ids, eos)),
        eos and c.min_length > 0 and Ban(eos, partial(bans.is_shorter, length=c.min_length)),
        eos and c.min_new_tokens > 0 and Ban(eos, partial(bans.has_fewer_new, count=c.min_new_tokens)),
        c.forced_bos_token_id is not None and partial(bans.forced_second, token=c.forced_bos_token_id),
        c.forced_eos_token_id is not None
        and partial(bans.forced_last, tokens=c.tokens("forced_eos_token_id")),
        c.suppress_tokens and Ban(c.tokens("suppress_tokens")),
        c.begin_suppress_tokens
        and Ban(
            c.tokens("begin_suppress_tokens"),
            partial(bans.begins, forced=c.forced_bos_token_id is not None),
        ),
        *(partial(of_user, processor=user, padding=c.padding) for user in users),
        constraint is not None and constraint.processor(eos),
        c.renormalize_logits and renormalized,
    ]
    return [processor for processor in chain if processor]


def of_user(history: History, scores: Tensor, processor: LogitsProcessor, padding: int) -> Tensor:
    return processor(history.ids(padding), scores.clone())  # which it may change, and keep


def penalty_options(config: GenerationConfig) -> dict[str, float]:
    """What `ops.penalize` or `ops.sample` is asked for; nothing where no option does anything."""
    values = config.repetition_penalty, config.frequency_penalty, config.presence_penalty
    names = "repetition", "frequency", "presence"
    return {} if values == (1, 0, 0) else dict(zip(names, values, strict=True))


def penalized(history: History, scores: Tensor, options: Mapping[str, float]) -> Tensor:
    return ops.penalize(scores, *history.written, **options, out=scores)


def renormalized(history: History, scores: Tensor) -> Tensor:
    return ops.log_softmax(scores, -1)
