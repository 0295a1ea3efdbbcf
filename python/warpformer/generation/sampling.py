import torch
from torch import Tensor

from warpformer.generation.config import GenerationConfig


class Greedy:
    """The likeliest token, the first of several."""

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def keep_(self, rows: Tensor):
        pass


class Sampler:
    """Draws the token of each row, by random numbers of its own.

    Args:
        seeds: of each row.
    """

    def __init__(self, config: GenerationConfig, seeds: list[int]):
        self.config = config
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """[B] of logits [B, V]."""
        logits, tokens = filtered(logits, self.config).sort(descending=True, stable=True)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        draws = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
        draws = draws.to(logits.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, draws, right=True)
        return tokens.gather(1, chosen)[:, 0]

    def keep_(self, rows: Tensor):
        self.generators = [self.generators[row] for row in rows.tolist()]


def filtered(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Logits [B, V] after temperature, top_k and top_p; -inf of tokens that cannot be drawn.

    Source: transformers' TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, in their order;
    Holtzman et al., "The Curious Case of Neural Text Degeneration".
    """
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if config.top_p is not None and config.top_p < 1:
        ascending, tokens = logits.sort(stable=True)
        cut = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        cut[:, -1] = False  # the likeliest stays
        logits = logits.masked_fill(cut.scatter(1, tokens, cut), -torch.inf)
    return logits
