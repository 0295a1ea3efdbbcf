import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn.dropout import Dropout
from warpformer.nn.linear import Linear


class FeedForward(nn.Module):
    """The feed-forward block of a Transformer layer, on rows of tokens.

        forward(x, residual=None) = dropout(down(inner_dropout(activation(up(x))))) + residual

    Args:
        up: Linear, [C] to [F]; or a gated FusedLinear, [C] to [2 F], whose gate the activation is of.
        down: Linear, [F] to [C].
        activation: the name of a function of `ops.activation`.
        dropout, inner_dropout: probabilities, in training.

    Source: "Attention Is All You Need", 3.3; Shazeer, "GLU Variants Improve Transformer".
    """

    def __init__(
        self,
        up: nn.Module,
        down: nn.Module,
        activation: str,
        dropout: float = 0.0,
        inner_dropout: float = 0.0,
    ):
        super().__init__()
        self.up = up
        self.down = down
        self.activation = activation
        self.dropout = Dropout(dropout)
        self.inner_dropout = Dropout(inner_dropout)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and type(self.up) is Linear:
            hidden = ops.activation(self.up(x), self.activation)  # keeps its input, not to compute it again
        else:
            hidden = self.up(x, activation=self.activation)
        return added(self.down, self.dropout, self.inner_dropout(hidden), residual)

    def extra_repr(self):
        return f"activation={self.activation}"


def added(layer: nn.Module, dropout: nn.Dropout, x: Tensor, residual: Tensor | None) -> Tensor:
    """dropout(layer(x)) + residual"""
    if residual is None or (dropout.training and dropout.p):
        out = dropout(layer(x))
        return out if residual is None else residual + out
    return layer(x, residual=residual)
