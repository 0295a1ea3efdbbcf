from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from warpformer.generation.config import GenerationConfig
from warpformer.generation.defaults import of_model
from warpformer.generation.given_cache import GivenCache
from warpformer.generation.history import PADDING, History
from warpformer.generation.prompts import check_prompts, decoder_prompts, limits_of, longest_of
from warpformer.nn import KVCache
from warpformer.nn.block_pool import CacheFull

MOST_RESERVED = 2048  # tokens for which there is memory before they are written


class Cache(Protocol):
    """What wf.nn.KVCache is."""

    def reorder_(self, index: Tensor): ...

    # And for speculative decoding `tokens` and `rewind_(counts)`.


Prompt = tuple[Tensor, Tensor | None]  # [B, T], and its mask


def written_behind(model, prompt: Prompt, decoder_prompt, config: GenerationConfig) -> tuple[Prompt, History]:
    """What new tokens stand behind: the prompt, or of an encoder-decoder model its decoder's; and the history
    that begins there."""
    if hasattr(model, "encode"):
        first = config.decoder_start_token_id
        first = of_model(model, "bos_token_id") if first is None else first
        prompt = decoder_prompts(prompt[0], *decoder_prompt, first)
        check_prompts(model, *prompt, "decoder_")
    limits = partial(limits_of, config=config, longest=longest_of(model))
    return prompt, History.of_prompts(*prompt, limits)


class Decoding:
    """A model in the midst of a batch: what it has read is in its cache.

    The model has `make_cache()` and is called, for logits [B, 1, V] of each row's last token, as

        model(input_ids, attention_mask, cache=cache, logits_to_keep=1)

    or, if it has `encode`, as an encoder-decoder model: first as

        model(input_ids, attention_mask, decoder_input_ids=prompt, cache=cache, logits_to_keep=1)

    with decoder_attention_mask where `decoder_prompt` has one, and then with `decoder_input_ids` alone. With
    drafts it gives logits of several last tokens. Logits are good until the next call.

    Args:
        prompt: [B, T], and its mask or None.
        decoder_prompt: [B, P], and its mask or None; (None, None) for decoder_start_token_id alone.
        cache: one that the user has, or None.

    Attributes:
        prompt: [B, T] or, of a decoder beside an encoder, [B, P]: what stands before the new tokens.
        history: tokens of the rows.
        kept: what follows for a user's cache; None without.
    """

    def __init__(self, model, prompt, decoder_prompt, config: GenerationConfig, cache: KVCache | None = None):
        self.model = model
        self.is_encoder_decoder = hasattr(model, "encode")
        self.given, self.options = prompt, {}
        prompt, self.history = written_behind(model, prompt, decoder_prompt, config)
        if self.is_encoder_decoder:
            names = "decoder_input_ids", "decoder_attention_mask"
            self.options = {name: t for name, t in zip(names, prompt, strict=True) if t is not None}
        self.prompt = prompt[0]
        self.kept = None
        if cache is not None:
            self.kept = GivenCache(cache, self.history.lengths, self.is_encoder_decoder)
            if len(cache):
                self.given = self.kept.behind(*self.given)
        self.cache: Cache = model.make_cache() if cache is None else self.kept.fork
        if isinstance(self.cache, KVCache):
            self.cache.record_()
            if cache is None:  # memory that moves is copied, and ends what is recorded
                rows = max(config.num_beams, config.num_return_sequences)  # of each
                most = int((self.history.limits + (config.prompt_lookup_num_tokens or 0)).sum()) * rows
                begun = len(self.history.limits) * rows * self.cache.block_size  # a block of each row
                self.cache.reserve_(max(min(most, MOST_RESERVED), begun))

    def begin(self) -> Tensor:
        """Logits [B, V] of the first new token."""
        return self._logits(*self.given, **self.options)[:, -1]

    def step(self, history: History, index: Tensor | None = None) -> Tensor:
        """Logits [R, 1, V] of the token after the last of `history`, whose row r is row index[r] of what was,
        if `index` is given, and one token more."""
        self._follow(history, index)
        return self.read(history.last)

    def verify(self, history: History, index: Tensor | None, drafts: Tensor) -> Tensor:
        """Logits [R, 1 + k, V] of the token after the last of `history`, as `step` has them, and after each
        of drafts [R, k], any where there is PADDING; of fewer where the model reads no more, and where the
        cache has no room for them, [R, 1, V]. What the cache holds beyond `history` is forgotten."""
        self._follow(history, index)
        self._rewind_to(history.lengths.cpu().numpy() - 1)
        last, longest = history.last, longest_of(self.model)
        if longest is not None:
            drafts = drafts[:, : longest - int(history.lengths.max())]
        if not drafts.shape[1]:
            return self.read(last)
        try:
            return self.read(torch.cat([last, drafts.clamp(min=0)], 1))
        except CacheFull:
            return self.read(last)

    def catch_up(self, history: History, index: Tensor | None) -> Tensor:
        """Logits [R, V] of the token after the last of `history`, of which the cache holds the first tokens,
        and behind them what `read` has had since the last call."""
        if not len(self.cache):
            self.history = history
            if index is not None:
                self.select_prompts_(index)
            tokens, mask = history.ids(0), history.tokens != PADDING
            if self.is_encoder_decoder:
                options = {"decoder_input_ids": tokens, "decoder_attention_mask": mask}
                return self._logits(*self.given, **options)[:, -1]
            return self._logits(tokens, mask)[:, -1]
        self._follow(history, index)
        lengths = history.lengths.cpu().numpy()
        most = int((lengths - self.cache.tokens).clip(min=1).max())
        self._rewind_to(lengths - most)  # rows that lack fewer read some again: calls without a mask
        return self.read(history.tokens[:, -most:])[:, -1]

    def select_prompts_(self, index: Tensor):
        """Before any is read: row r becomes what row index[r] is."""
        self.given = tuple(None if t is None else t[index] for t in self.given)

    def read(self, tokens: Tensor) -> Tensor:
        """Logits [R, T, V] after each of tokens [R, T] that follow in the rows."""
        if self.is_encoder_decoder:
            return self._logits(decoder_input_ids=tokens, keep=tokens.shape[1])
        return self._logits(tokens, keep=tokens.shape[1])

    def repeat_(self, index: Tensor):
        """Row r becomes what row index[r] was."""
        self.cache.reorder_(index)
        if self.kept is not None:
            self.kept.repeat_(len(index))
        self.history = self.history.select(index)

    def _follow(self, history: History, index: Tensor | None):
        if index is not None:
            if self.kept is not None:
                self.kept.keep_(index)
            self.cache.reorder_(index)
        self.history = history

    def _rewind_to(self, lengths):
        """Takes back what the cache holds behind the first lengths[r] tokens of each row."""
        beyond = self.cache.tokens - lengths
        if beyond.any():
            self.cache.rewind_(beyond)

    def _logits(self, *args, keep: int = 1, **options):
        logits = self.model(*args, **options, cache=self.cache, logits_to_keep=keep)
        return logits if logits.is_floating_point() else logits.float()
