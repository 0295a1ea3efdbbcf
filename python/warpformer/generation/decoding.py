from functools import partial
from typing import Protocol

from torch import Tensor

from warpformer.generation.config import GenerationConfig
from warpformer.generation.defaults import of_model
from warpformer.generation.history import History
from warpformer.generation.prompts import check_prompts, decoder_prompts, limits_of, longest_of


class Cache(Protocol):
    """What wf.nn.KVCache is."""

    def reorder_(self, index: Tensor): ...


class Decoding:
    """A model in the midst of a batch: what it has read is in its cache.

    The model has `make_cache()` and is called, for logits [B, 1, V] of each row's last token, as

        model(input_ids, attention_mask, cache=cache, logits_to_keep=1)

    or, if it has `encode`, as an encoder-decoder model: first as

        model(input_ids, attention_mask, decoder_input_ids=prompt, cache=cache, logits_to_keep=1)

    with decoder_attention_mask where `decoder_prompt` has one, and then with `decoder_input_ids` alone.

    Args:
        prompt: [B, T], and its mask or None.
        decoder_prompt: [B, P], and its mask or None; (None, None) for decoder_start_token_id alone.

    Attributes:
        prompt: [B, T] or, of a decoder beside an encoder, [B, P]: what stands before the new tokens.
        history: tokens of the rows.
    """

    def __init__(self, model, prompt, decoder_prompt, config: GenerationConfig):
        self.model = model
        self.is_encoder_decoder = hasattr(model, "encode")
        self.given, self.options = prompt, {}
        if self.is_encoder_decoder:
            first = config.decoder_start_token_id
            first = of_model(model, "bos_token_id") if first is None else first
            prompt = decoder_prompts(prompt[0], *decoder_prompt, first)
            check_prompts(model, *prompt, "decoder_")
            names = "decoder_input_ids", "decoder_attention_mask"
            self.options = {name: t for name, t in zip(names, prompt, strict=True) if t is not None}
        self.prompt = prompt[0]
        limits = partial(limits_of, config=config, longest=longest_of(model))
        self.history = History.of_prompts(*prompt, limits)
        self.cache: Cache = model.make_cache()

    def begin(self) -> Tensor:
        """Logits [B, V] of the first new token."""
        return self._logits(*self.given, **self.options)

    def step(self, history: History, index: Tensor | None = None) -> Tensor:
        """Logits [R, V] of the token after the last of `history`, whose row r is row index[r] of what was, if
        `index` is given, and one token more."""
        if index is not None:
            self.cache.reorder_(index)
        self.history = history
        last = history.tokens[:, -1:]
        return self._logits(decoder_input_ids=last) if self.is_encoder_decoder else self._logits(last)

    def repeat_(self, index: Tensor):
        """Row r becomes what row index[r] was."""
        self.cache.reorder_(index)
        self.history = self.history.select(index)

    def _logits(self, *args, **options):
        return self.model(*args, **options, cache=self.cache, logits_to_keep=1)[:, -1].float()
