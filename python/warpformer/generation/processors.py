"""The way from the logits of a step to its scores: functions (History, scores [R, V]) -> scores [R, V].

They look at each row alone and keep no state, so that rows may join and leave a batch.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from warpformer.generation import bans, filters, penalties
from warpformer.generation.config import GenerationConfig
from warpformer.generation.history import History

Processor = Callable[[History, Tensor], Tensor]
LogitsProcessor = Callable[[Tensor, Tensor], Tensor]  # of transformers, and of users


def processors(config: GenerationConfig, users: Sequence[LogitsProcessor] = ()) -> list[Processor]:
    """Those that the options ask for, in the order of transformers."""
    c, eos = config, config.eos_token_ids
    chain = [
        c.repetition_penalty != 1 and partial(penalties.repetition, penalty=c.repetition_penalty),
        c.frequency_penalty != 0 and partial(penalties.frequency, penalty=c.frequency_penalty),
        c.presence_penalty != 0 and partial(penalties.presence, penalty=c.presence_penalty),
        c.no_repeat_ngram_size > 0 and partial(bans.repeated_ngrams, size=c.no_repeat_ngram_size),
        *(partial(bans.bad_words, words=words) for words in bans.by_length(c.bad_words_ids, eos)),
        eos and c.min_length > 0 and partial(bans.until_length, tokens=eos, length=c.min_length),
        eos and c.min_new_tokens > 0 and partial(bans.until_new, tokens=eos, count=c.min_new_tokens),
        c.forced_bos_token_id is not None and partial(bans.forced_second, token=c.forced_bos_token_id),
        c.forced_eos_token_id is not None
        and partial(bans.forced_last, tokens=c.tokens("forced_eos_token_id")),
        c.suppress_tokens and partial(bans.suppressed, tokens=c.tokens("suppress_tokens")),
        c.begin_suppress_tokens
        and partial(
            bans.suppressed_first,
            tokens=c.tokens("begin_suppress_tokens"),
            forced=c.forced_bos_token_id is not None,
        ),
        *(partial(of_user, processor=user, padding=c.padding) for user in users),
        c.temperature != 1 and partial(filters.temperature, temperature=c.temperature),
        c.top_k and partial(filters.top_k, k=c.top_k),
        c.top_p is not None and c.top_p < 1 and partial(filters.top_p, p=c.top_p),
        c.min_p and partial(filters.min_p, p=c.min_p),
        c.typical_p is not None and c.typical_p < 1 and partial(filters.typical_p, p=c.typical_p),
        c.renormalize_logits and filters.renormalized,
    ]
    return [processor for processor in chain if processor]


def of_user(history: History, scores: Tensor, processor: LogitsProcessor, padding: int) -> Tensor:
    return processor(history.ids(padding), scores)
