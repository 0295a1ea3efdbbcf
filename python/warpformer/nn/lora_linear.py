from collections.abc import Iterable

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._packed import PackedModule
from warpformer.nn._parts import WHOLE
from warpformer.nn.dropout import Dropout
from warpformer.nn.linear import Linear


class LoRALinear(nn.Module):
    """A linear layer that stays as it is, and what is trained beside it: a product of two small matrices.

        forward(input, activation="none", residual=None) = activation(z) + residual
        z = base(input) + (alpha / rank) B A dropout(input)

    and with a gated base, z = [gate, up], activation(gate) up + residual. A layer of several parts, as
    queries, keys and values, has an A and a B for each. B begins as 0.

    Args:
        base: Linear, FusedLinear, PackedLinear, Int8Linear or Int4Linear; its parameters get no gradient.
        rank: columns of B.
        alpha: see above.
        dropout: probability of a 0 in the input of A, in training.
        parts: which of the base's get an A and a B; all if None.
        dtype: of A and B; sums are in float32, and outputs in the dtype of the input.

    Attributes:
        A: [parts * rank, K].
        B: of each part [its rows, rank].
        adapted: names of the parts; "" is all of a layer that has none.
        weight: [N, K] the base's and the product together, made anew on every access.

    Raises:
        InputError: `base` is none of these, or a part is not one of its.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); Dettmers et al., "QLoRA".
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        *,
        parts: Iterable[str] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not is_adaptable(base):
            raise InputError(f"LoRALinear: base is a {type(base).__name__}, not a linear layer of warpformer")
        if rank < 1:
            raise InputError(f"LoRALinear: rank = {rank} is not at least 1")
        self.base = base.requires_grad_(False)
        self.rows = parts_of(base)
        self.adapted = [*self.rows] if parts is None else [part for part in self.rows if part in set(parts)]
        if not self.adapted or (parts is not None and not set(parts) <= self.rows.keys()):
            raise InputError(f"LoRALinear: parts = {parts} are not among {[*self.rows]}")
        self.rank, self.alpha = rank, alpha
        self.dropout = Dropout(dropout)
        options = {"device": _device(base), "dtype": dtype}
        self.A = nn.Parameter(torch.empty(len(self.adapted) * rank, base.in_features, **options))
        self.B = nn.ParameterList(torch.empty(self.rows[part], rank, **options) for part in self.adapted)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.A, a=5**0.5)
        for part in self.B:
            nn.init.zeros_(part)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    @property
    def gated(self) -> bool:
        return getattr(self.base, "gated", False)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight
        return (weight.float() + self.product()).to(weight.dtype)

    def product(self) -> Tensor:
        """(alpha / rank) B A, [N, K] float32, 0 in the rows of parts without."""
        matrices = dict(zip(self.adapted, zip(self.A.split(self.rank), self.B, strict=True), strict=True))
        rows = [
            self.scale * (matrices[part][1].float() @ matrices[part][0].float())
            if part in matrices
            else self.A.new_zeros(count, self.in_features, dtype=torch.float32)
            for part, count in self.rows.items()
        ]
        return torch.cat(rows)

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        added = self._added(input)
        if activation == "none" and not self.gated:
            return self.base(input, residual=added if residual is None else added + residual)
        out = ops.activation(self._before_gate(input, added), activation, gated=self.gated)
        return out if residual is None else out + residual

    def _added(self, input):
        """[..., N] what A and B make of the input."""
        hidden = self.scale * ops.linear(self.dropout(input), self.A)
        hidden = dict(zip(self.adapted, zip(hidden.split(self.rank, -1), self.B, strict=True), strict=True))
        columns = [
            ops.linear(*hidden[part]) if part in hidden else input.new_zeros(*input.shape[:-1], count)
            for part, count in self.rows.items()
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def _before_gate(self, input, residual):
        if isinstance(self.base, PackedModule):
            return self.base.before_gate(input, residual)
        return Linear.forward(self.base, input, residual=residual)

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}, adapted={self.adapted}"


def is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, Linear | PackedModule) and not hasattr(module, "num_experts")


def parts_of(module: nn.Module) -> dict[str, int]:
    """Name of each part of a linear layer -> its rows."""
    return dict(getattr(module, "parts", None) or {WHOLE: module.out_features})


def _device(base):
    return base.packed.device if isinstance(base, PackedModule) else base.weight.device
