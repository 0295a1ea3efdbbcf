"""What stands on a backbone instead of a language model's output, for decoders and encoders alike."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from warpformer.nn import Linear, Sequences


class Head(nn.Module):
    """A backbone and what is made of its hidden states.

    Args:
        backbone: with `forward_rows`.
        config: with hidden_size and num_labels.
    """

    prefix: str | None = None  # of the backbone in checkpoints, where it is not the architecture's

    def __init__(self, backbone: nn.Module, config):
        super().__init__()
        self.config = config
        self.backbone = backbone


class LastTokenClassifier(Head):
    """Logits [B, num_labels] of the last token of each sequence: score(hidden)."""

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of the backbone."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        return self.score(rows[sequences.last()[0].flatten()])


class TokenClassifier(Head):
    """Logits [B, T, num_labels] of every token, 0 at padding: classifier(hidden)."""

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of the backbone."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        return sequences.pad(self.classifier(rows))


class Span(NamedTuple):
    start_logits: Tensor  # [B, T], -inf at padding
    end_logits: Tensor  # [B, T]


class QuestionAnswering(Head):
    """Logits of the first and the last token of the answer: qa(hidden)."""

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.qa = Linear(config.hidden_size, 2)

    def forward(self, *args, **kwargs) -> Span:
        """Arguments are those of the backbone."""
        return self.span(*self.backbone.forward_rows(*args, **kwargs))

    def span(self, rows: Tensor, sequences: Sequences) -> Span:
        """Of hidden states [N, C] without padding."""
        logits = sequences.pad(self.qa(rows))
        if sequences.kept is not None:
            logits = logits.masked_fill(~sequences.kept[..., None], -torch.inf)
        return Span(*logits.unbind(-1))


class DecoderQuestionAnswering(QuestionAnswering):
    prefix = "transformer"
