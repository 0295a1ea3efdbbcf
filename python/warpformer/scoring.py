"""How likely texts are to a language model."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.training.objectives.causal import CausalLM
from warpformer.training.text import Texts


class Perplexity(NamedTuple):
    """How well a language model predicts texts.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: how many were predicted.
        bytes: UTF-8 bytes of the texts, the line breaks between their lines included.
    """

    loss: float
    tokens: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), of a token: models with other tokenizers have other ones."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """loss tokens / (bytes log 2), whatever the tokenizer."""
        return self.loss * self.tokens / (self.bytes * math.log(2))


def perplexity(
    model: nn.Module, tokenizer: Tokenizer, texts: Texts, *, window: int = 512, stride: int | None = None
) -> Perplexity:
    """The perplexity of a language model on texts that are read as `training.CausalLM` reads them.

    Args:
        model: a language model in eval mode, as `warpformer.load` returns it.
        tokenizer: its own, with `</s>`.
        texts: of one column. A document ends with `</s>`, which is predicted, too.
        window, stride: as in `token_losses`; half a window if None.

    Raises:
        InputError: the texts have several columns, window or stride does not fit.
    """
    tokens = torch.from_numpy(CausalLM(texts, tokenizer, max_length=window).stream).long()
    stride = max(1, window // 2) if stride is None else stride
    losses = token_losses(model, tokens, window=window, stride=stride)
    line_breaks = len(texts.rows) - len(texts.documents)
    size = sum(len(text.encode()) for text in texts.column()) + line_breaks
    return Perplexity(losses.double().mean().item(), len(losses), size)


@torch.no_grad()
def token_losses(
    model: nn.Module, tokens: Tensor, *, window: int, stride: int, max_tokens: int = 8192
) -> Tensor:
    """The negative log-likelihood of each token of a text but the first, in float32.

        out[t - 1] = -log p(tokens[t] | tokens[max(0, e - window) : t])        e, the end of the window of t:
        e = window for the first `window` tokens after tokens[0], then it moves on by `stride`

    so that each token is counted once, with all tokens before it or at least window - stride + 1 of them.

    Args:
        model: a language model, as `warpformer.load` returns it, in eval mode.
        tokens: [N] int64, of one text.
        window: tokens that the model reads at once.
        stride: from 1 (each token with as many before it as there can be) to window (blocks).
        max_tokens: that are computed together, at least a window.

    Returns:
        [N - 1].

    Raises:
        InputError: stride is not in 1 .. window, or there is no token to predict.

    Source: the sliding window of "Perplexity of fixed-length models" in the documentation of transformers.
    """
    targets = len(tokens) - 1
    if not 1 <= stride <= window:
        raise InputError(f"token_losses: stride = {stride} is not in 1..window = {window}")
    if targets < 1:
        raise InputError(f"token_losses: {len(tokens)} tokens leave none to predict")
    length = min(window, targets)
    ends = [*range(length, targets, stride), targets]
    counts = [length, *(end - before for before, end in pairwise(ends))]
    device = next(model.parameters()).device
    size = max(1, max_tokens // length)
    losses = []
    for i in range(0, len(ends), size):
        read = torch.cat([torch.arange(end - length, end) for end in ends[i : i + size]])
        counted = torch.cat(
            [
                torch.arange((row + 1) * length - count, (row + 1) * length)
                for row, count in enumerate(counts[i : i + size])
            ]
        )
        hidden, _ = model.backbone.forward_rows(tokens[read].view(-1, length).to(device))
        logits = model.logits(hidden[counted.to(device)]).float()
        labels = tokens[read[counted] + 1].to(device)
        losses.append(ops.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses)
