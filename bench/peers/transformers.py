"""transformers decoding as its `generate` does on a GPU: compiled, over a static cache."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache


def is_held_to(isa: str) -> bool:
    """Of GPUs, where there is none."""
    return True


class Decoder:
    """Logits [B, V] of a token of each sequence behind a prompt, always at the same place."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor):
        self.cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + 1)
        model(prompt, None, None, self.cache)  # by place: versions name it differently
        self.lengths = [layer.cumulative_length for layer in self.cache.layers]
        self.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def __call__(self, ids: Tensor) -> Tensor:
        logits = self.forward(ids, None, None, self.cache, logits_to_keep=1).logits[:, -1].clone()
        torch._foreach_sub_(self.lengths, 1)
        return logits
