"""What a draw is made among: scores of other tokens become -inf. And what scales scores."""

import torch
from torch import Tensor

from warpformer.generation.history import History


def temperature(history: History, scores: Tensor, temperature: float) -> Tensor:
    return scores / temperature


def top_k(history: History, scores: Tensor, k: int) -> Tensor:
    """The k greatest, and those that equal the last of them."""
    least = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    return scores.masked_fill(scores < least, -torch.inf)


def top_p(history: History, scores: Tensor, p: float) -> Tensor:
    """The fewest of the greatest whose probabilities reach p together.

    Source: Holtzman et al., "The Curious Case of Neural Text Degeneration".
    """
    ascending, tokens = scores.sort(stable=True)
    cut = ascending.softmax(-1).cumsum(-1) <= 1 - p
    cut[:, -1] = False  # the likeliest stays
    return scores.masked_fill(torch.zeros_like(cut).scatter_(1, tokens, cut), -torch.inf)


def min_p(history: History, scores: Tensor, p: float) -> Tensor:
    """Those whose probability is at least p times the greatest.

    Source: Nguyen et al., "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs".
    """
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def typical_p(history: History, scores: Tensor, p: float) -> Tensor:
    """The fewest whose -log probability is nearest to the entropy, and whose probabilities reach p together.

    Source: Meister et al., "Locally Typical Sampling".
    """
    log_probs = scores.log_softmax(-1)
    entropy = -(log_probs * log_probs.exp()).nansum(-1, keepdim=True)  # 0 log 0 = 0
    distances, tokens = (-log_probs - entropy).abs().sort(stable=True)
    reached = scores.gather(1, tokens).softmax(-1).cumsum(-1)
    last = (reached < p).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    cut = distances > distances.gather(1, last)
    return scores.masked_fill(torch.zeros_like(cut).scatter_(1, tokens, cut), -torch.inf)


def renormalized(history: History, scores: Tensor) -> Tensor:
    return scores.log_softmax(-1)
