"""The options of `generate`, under the names of transformers' GenerationConfig."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from warpformer.generation.checks import ALLOWED, as_tuple, is_integer, require

NEW_TOKENS = 128  # of a row, where nothing limits them
OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
OF_LOOKUP = ("prompt_lookup_num_tokens", "max_matching_ngram_size")
OF_BEAMS = ("length_penalty", "early_stopping", "patience", "num_beam_groups", "diversity_penalty")
TOKENS = ("eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
TOKENS += ("forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How `generate` chooses tokens, and when it stops.

    Of logits x of the next token the options make scores, in the order in which they are listed; the loop
    takes the token of the greatest score, or draws one with the probabilities p = softmax(scores). Lengths
    and tokens are a row's own, without padding; those of an encoder-decoder model are its decoder's.

    Args:
        max_new_tokens: of a row, the end-of-sequence token included; 128 if None and without max_length.
        max_length: of a row, the prompt included. Not together with max_new_tokens.
        repetition_penalty: r > 0: x of tokens that the row has becomes x / r if x >= 0, else r x (Keskar et
            al., "CTRL").
        frequency_penalty: f: x of a token loses f for each time that it was written, the prompt not counted.
        presence_penalty: x of tokens that were written loses so much (both: OpenAI's API).
        no_repeat_ngram_size: n: no n tokens in a row come twice in a row; 0 for any.
        bad_words_ids: sequences of tokens, none of which is completed. One eos_token_id alone may come.
        min_length: no eos_token_id before a row has so many tokens, the prompt included.
        min_new_tokens: no eos_token_id before so many new ones.
        forced_bos_token_id: the token that follows a row's first: the language of mBART.
        forced_eos_token_id: the token, or the tokens, of which one is the last where the length ends a row.
        suppress_tokens: tokens that never come.
        begin_suppress_tokens: tokens that do not come first.
        do_sample: draw tokens; else take the likeliest.
        temperature: divides scores. Below 1 likely tokens become likelier.
        top_k: draw among the k likeliest tokens alone; 0 or None for all.
        top_p: draw among the likeliest tokens alone whose probabilities reach p together (Holtzman et al.,
            "The Curious Case of Neural Text Degeneration").
        min_p: draw among tokens alone that are at least min_p times as likely as the likeliest (Nguyen et
            al., "Turning Up the Heat").
        typical_p: draw among the tokens alone whose -log p is nearest to the entropy, and whose probabilities
            reach typical_p together (Meister et al., "Locally Typical Sampling").
        renormalize_logits: scores become log_softmax(scores) in the end, which counts in a beam search.
        num_beams: of a beam search, whose scores begin as log_softmax(x); 1 for none.
        length_penalty: a beam of n new tokens is worth (the sum of its scores) / n ** length_penalty.
        early_stopping: True: a row ends when it has its results, num_beams beams that have ended. False: when
            no running beam is worth more than the worst of those, at the present length. "never": nor at any
            later length.
        patience: a row has round(patience num_beams) results (Kasai et al., "A Call for Clarity in Beam
            Search").
        num_beam_groups: the beams are that many searches, which choose one after the other at every step.
        diversity_penalty: what a token's score loses for every beam of the groups before that has it at this
            step (Vijayakumar et al., "Diverse Beam Search"); none for eos_token_id. Beams keep the loss.
        num_return_sequences: how many a row gives: the best of a beam search, or so many draws.
        prompt_lookup_num_tokens: draft so many tokens, at most, of what followed in the row where its last
            tokens stood before, and verify them in one call of the model (Saxena, "Prompt Lookup Decoding");
            None for none. It changes no token, but the time.
        max_matching_ngram_size: of the last tokens that are looked up, 2 if None; fewer if that many do not
            come before.
        num_assistant_tokens: that an assistant_model drafts for each call of the model; 5 if None.
        stop_strings: texts that end a row, when its last token completes one; `generate` needs a tokenizer.
        return_dict_in_generate: return `Generated` and not the tokens alone.
        eos_token_id: the token, or the tokens, that end a row.
        pad_token_id: what stands behind the end of a row; the first eos_token_id if None.
        decoder_start_token_id: what the decoder of an encoder-decoder model reads first.

    Raises:
        InputError: a value is out of its range, or an option has no meaning beside the others.

    Source: transformers.GenerationConfig, for what has no other source.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    renormalize_logits: bool = False
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    patience: float = 1.0
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    num_return_sequences: int = 1
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    num_assistant_tokens: int | None = None
    stop_strings: str | Sequence[str] | None = None
    return_dict_in_generate: bool = False
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self):
        self._check_values()
        self._check_combinations()
        self._check_lists()

    def _check_values(self):
        for names, allows, allowed in ALLOWED:
            for name in names.split():
                value = getattr(self, name)
                require(allows(value), f"{name} = {value!r:.80} is not {allowed}")
        for name in TOKENS:
            tokens = self.tokens(name)
            require(
                all(is_integer(token) and token >= 0 for token in tokens),
                f"{name} = {getattr(self, name)!r:.80} is not of tokens 0, 1, 2...",
            )

    def _check_combinations(self):
        require(
            self.max_new_tokens is None or self.max_length is None,
            "max_new_tokens and max_length exclude each other",
        )
        for least, most in (("min_new_tokens", "max_new_tokens"), ("min_length", "max_length")):
            low, high = getattr(self, least), getattr(self, most)
            require(high is None or low <= high, f"{least} = {low} is over {most} = {high}")
        require(not self.do_sample or self.num_beams == 1, "do_sample and num_beams > 1 exclude each other")
        self._check_unused(OF_SAMPLING, self.do_sample, "do_sample=True")
        self._check_unused(OF_BEAMS, self.num_beams > 1, "num_beams > 1")
        looks_up = self.prompt_lookup_num_tokens is not None
        self._check_unused(("max_matching_ngram_size",), looks_up, "prompt_lookup_num_tokens")
        require(
            not looks_up or self.num_beams == 1,
            "prompt_lookup_num_tokens and num_beams > 1 exclude each other",
        )
        groups = self.num_beam_groups
        require(
            self.num_beams % groups == 0,
            f"num_beams = {self.num_beams} is no multiple of num_beam_groups = {groups}",
        )
        require(
            (groups > 1) == (self.diversity_penalty > 0),
            f"diversity_penalty = {self.diversity_penalty} does not go with num_beam_groups = {groups}: "
            "several groups have one above 0, and one has none",
        )

    def _check_lists(self):
        most = self.num_beam_groups * self.results if self.num_beams > 1 else 1
        require(
            self.do_sample or self.num_return_sequences <= most,
            f"num_return_sequences = {self.num_return_sequences} is over {most}, and there are no more "
            "results without do_sample=True",
        )
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            tokens = self.tokens(name)
            require(
                not tokens or not set(tokens) <= set(self.suppress_tokens or ()),
                f"{name} = {getattr(self, name)} is among suppress_tokens",
            )

    def _check_unused(self, names, used, why):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names:
                require(used or value == field.default, f"{field.name} = {value!r} counts with {why} alone")

    def tokens(self, name: str) -> tuple:
        """All tokens of an option."""
        value = as_tuple(getattr(self, name))
        return (
            tuple(token for word in value for token in as_tuple(word)) if name == "bad_words_ids" else value
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return as_tuple(self.eos_token_id)

    @property
    def padding(self) -> int:
        """The token behind the end of a row: 0 where no row ends before others."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    @property
    def beams(self) -> int:
        """Of a group."""
        return self.num_beams // self.num_beam_groups

    @property
    def results(self) -> int:
        """Of a group, at most."""
        return max(1, round(self.patience * self.beams))
