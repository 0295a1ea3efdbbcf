from typing import Protocol

import torch
from torch import Tensor

from warpformer.generation.config import GenerationConfig, of_model, require


class Cache(Protocol):
    """What wf.nn.KVCache is."""

    def reorder_(self, index: Tensor): ...


class Decoding:
    """A model in the midst of a batch: what it has read is in its cache.

    The model has `make_cache()` and is called, for logits [B, 1, V] of each row's last token, as

        model(input_ids, attention_mask, cache=cache, logits_to_keep=1)

    or, if it has `encode`, as an encoder-decoder model: first as

        model(input_ids, attention_mask, decoder_input_ids=first_tokens, cache=cache, logits_to_keep=1)

    and then with `decoder_input_ids` alone.

    Args:
        input_ids: [B, T].
        attention_mask: [B, T], or None.

    Attributes:
        prompt: [B, T] or, of a decoder beside an encoder, [B, 1]: what stands before the new tokens.
    """

    def __init__(self, model, input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig):
        self.model = model
        self.cache: Cache = model.make_cache()
        self.is_encoder_decoder = hasattr(model, "encode")
        self.given = input_ids, attention_mask
        self.prompt = input_ids
        if self.is_encoder_decoder:
            first = config.decoder_start_token_id
            first = of_model(model, "bos_token_id") if first is None else first
            require(first is not None, "neither the call nor config.json has a decoder_start_token_id")
            self.prompt = torch.full_like(input_ids[:, :1], first)

    def begin(self) -> Tensor:
        """Logits [B, V] of the first new token."""
        if self.is_encoder_decoder:
            return self._logits(*self.given, decoder_input_ids=self.prompt)
        return self._logits(*self.given)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] of the token after `tokens` [B]."""
        if self.is_encoder_decoder:
            return self._logits(decoder_input_ids=tokens[:, None])
        return self._logits(tokens[:, None])

    def reorder_(self, index: Tensor):
        """Row b becomes what row index[b] was; there may be more or fewer than before."""
        self.cache.reorder_(index)

    def _logits(self, *args, **options):
        return self.model(*args, **options, cache=self.cache, logits_to_keep=1)[:, -1].float()
