from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor

from warpformer.generation.beam_search import beam_search
from warpformer.generation.checks import require
from warpformer.generation.columns import Columns, Streamer
from warpformer.generation.config import GenerationConfig
from warpformer.generation.constraint import Constraint
from warpformer.generation.decoding import Decoding
from warpformer.generation.defaults import check_tokens, config_for
from warpformer.generation.drafts import Drafter, DraftModel, PromptLookup
from warpformer.generation.processors import LogitsProcessor
from warpformer.generation.prompts import check_prompts, longest_of
from warpformer.generation.rules import Rules
from warpformer.generation.sampling import seeds_of
from warpformer.generation.stopping import StoppingCriterion
from warpformer.generation.write import write
from warpformer.nn import KVCache

DRAFTED, MATCHED = 5, 2  # num_assistant_tokens and max_matching_ngram_size where none is given


class Generated(NamedTuple):
    """What `generate` returns with return_dict_in_generate=True.

    Attributes:
        sequences: [R, T + new] int64, what it returns without.
        log_probs: [R, new] float32: of each new token log_softmax(the model's logits), whatever the options
            made of them; 0 behind the end of a row.
        sequences_scores: [R] float32 of a beam search: what each sequence is worth; else None.
    """

    sequences: Tensor
    log_probs: Tensor
    sequences_scores: Tensor | None


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    seed: int | Sequence[int] | None = None,
    cache: KVCache | None = None,
    assistant_model=None,
    streamer: Streamer | None = None,
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = (),
    stopping_criteria: StoppingCriterion | Sequence[StoppingCriterion] = (),
    tokenizer: Tokenizer | None = None,
    constraint: Constraint | None = None,
    **options,
) -> Tensor | Generated:
    """Tokens that a language or encoder-decoder model writes: greedily, by drawing, or by beam search.

    A row gives the same tokens alone and in any batch. Rows that have ended are not computed. A row ends at
    the latest when it has one token more than the model was made for (`max_position_embeddings`).

    Args:
        model: what `warpformer.load` returns of a causal or conditional-generation architecture, in eval
            mode; or any module with `make_cache` that takes what these take.
        input_ids: [B, T] int64 or int32: prompts, or what the encoder reads.
        attention_mask: [B, T], nonzero = a token, 0 = padding, anywhere in a row; all are tokens if None.
        decoder_input_ids: [B, P]: how the decoder of an encoder-decoder model begins, with or without the
            decoder_start_token_id.
        decoder_attention_mask: [B, P], as attention_mask.
        seed: of the draws of row 0; row b has seed + b. Or one for each row. torch's generator gives one
            if None. The sequences of a row draw apart from each other.
        cache: from `model.make_cache`, if it is to be of another kind than a new one, or holds the beginning
            of each prompt, which is then not computed. `input_ids` are whole prompts all the same: penalties
            look at all of them. Afterwards it holds all tokens of the R rows but the last of each, so that a
            following turn, whose prompts begin with what is returned without padding, computes what is new
            alone; after a beam search or an error it is as before. Of an encoder-decoder model it holds
            nothing at first.
        assistant_model: a smaller model of the same vocabulary, which drafts num_assistant_tokens for each
            call of `model`, which verifies them at once. It changes no token, but the time. Not with beams.
        streamer: its `put` gets the prompt, then the tokens [R] of each place behind it; then its `end` is
            called. Not with beams.
        logits_processor: one or several, as transformers' are: (input_ids [R, T], scores [R, V]) -> scores
            [R, V], called after the options' own, before those of drawing, with the rows that have not ended.
            Rows have their prompts without padding, at the right, behind pad_token_id. The scores are
            logits, or in a beam search log-probabilities, in memory that the next step uses again: what is to
            be kept of them must be copied.
        stopping_criteria: one or several, as transformers' are: (input_ids [R, T], None) -> [R] bool or a
            bool: whether rows end with the last of these tokens.
        tokenizer: of the tokenizers library, for stop_strings.
        constraint: a grammar that the new tokens of each row follow; after all other options of scores.
        options: those of `GenerationConfig`. Of what is not given the model's generation_config.json and
            config.json count, unless it has no meaning beside what is given; None gives the default.

    Returns:
        [R, T + new] the prompts as given and what follows, R = B num_return_sequences; of an encoder-decoder
        model [R, P + new], from decoder_start_token_id on. Rows that end before others have pad_token_id
        behind their end. Where a beam search finds fewer sequences, the others have nothing but padding.

    Raises:
        InputError: an option is out of its range or contradicts another; a prompt is empty, or longer than
            the model reads; an id is outside the vocabulary; the options leave a row no token; `cache` holds
            other sequences than the prompts, or all of one; `assistant_model` has another vocabulary.
        CacheFull: `cache` has no room for the tokens.
        TypeError: an option is not known.

    Source: transformers.GenerationMixin.generate; Leviathan, Kalman and Matias, "Fast Inference from
    Transformers via Speculative Decoding" (2023).
    """
    config = config_for(model, options)
    check_prompts(model, input_ids, attention_mask)
    require(streamer is None or config.num_beams == 1, "a streamer cannot follow num_beams > 1")
    require(
        decoder_input_ids is None or hasattr(model, "encode"),
        "decoder_input_ids are of encoder-decoder models",
    )
    require(
        assistant_model is not None or options.get("num_assistant_tokens") is None,
        f"num_assistant_tokens = {config.num_assistant_tokens} counts with an assistant_model alone",
    )
    rules = Rules(config, as_list(logits_processor), as_list(stopping_criteria), tokenizer, constraint)
    prompts = (input_ids, attention_mask), (decoder_input_ids, decoder_attention_mask)
    decoding = Decoding(model, *prompts, config, cache)
    drafting = drafting_of(assistant_model, decoding, prompts, config)
    logits = decoding.begin()
    check_tokens(config, logits.shape[1])
    prompt = decoding.prompt.repeat_interleave(config.num_return_sequences, 0)
    if config.num_beams > 1:
        new, log_probs, worths = beam_search(decoding, logits, rules)
    else:
        seeds = seeds_of(seed, len(logits), config.num_return_sequences) if config.do_sample else None
        choose = rules.chooser(seeds)
        columns = Columns(len(prompt), config.padding, streamer)
        if streamer is not None:
            streamer.put(prompt.cpu())
        if config.num_return_sequences > 1:
            index = torch.arange(len(prompt), device=logits.device) // config.num_return_sequences
            logits = logits[index]
            decoding.repeat_(index)
            if drafting is not None:
                drafting.select_prompts_(index)
        drafter = drafter_of(drafting, config, logits.shape[1])
        lengths = write(decoding, logits, rules, choose, columns, drafter)
        if streamer is not None:
            streamer.end()
        if decoding.kept is not None:
            decoding.kept.finish(lengths)
        new, log_probs, worths = *columns.stack(), None
    sequences = torch.cat([prompt, new.to(prompt.dtype)], 1)
    return Generated(sequences, log_probs, worths) if config.return_dict_in_generate else sequences


def drafting_of(assistant_model, decoding: Decoding, prompts, config: GenerationConfig) -> Decoding | None:
    """That of the assistant_model, if there is one."""
    if assistant_model is None:
        return None
    require(
        config.prompt_lookup_num_tokens is None,
        "assistant_model and prompt_lookup_num_tokens exclude each other",
    )
    require(config.num_beams == 1, "assistant_model and num_beams > 1 exclude each other")
    longest, length = longest_of(assistant_model), int(decoding.history.lengths.max())
    require(
        longest is None or length <= longest,
        f"the prompts have {length} tokens, and the assistant_model reads {longest}",
    )
    drafting = Decoding(assistant_model, *prompts, config)
    require(
        drafting.is_encoder_decoder == decoding.is_encoder_decoder,
        "one of model and assistant_model is an encoder-decoder model, and the other is none",
    )
    return drafting


def drafter_of(drafting: Decoding | None, config: GenerationConfig, vocabulary: int) -> Drafter | None:
    if drafting is not None:
        return DraftModel(drafting, config.num_assistant_tokens or DRAFTED, vocabulary)
    if config.prompt_lookup_num_tokens is not None:
        return PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size or MATCHED)
    return None


class Generating:
    """What gives a model its `generate`.

    Attributes:
        generation_config: generation_config.json of the checkpoint: defaults of the options.
    """

    generation_config: Mapping = MappingProxyType({})

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options
    ) -> Tensor | Generated:
        """Tokens: `warpformer.generate(self, ...)`."""
        return generate(self, input_ids, attention_mask, **options)


def as_list(value) -> list:
    """Of one or several functions; transformers' lists can be called, too."""
    return list(value) if isinstance(value, Sequence) else [value]
