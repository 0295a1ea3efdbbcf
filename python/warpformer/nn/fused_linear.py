from collections.abc import Mapping

from torch import Tensor

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._parts import ParameterInParts
from warpformer.nn.linear import Linear
from warpformer.nn.packed_linear import PackedLinear


class FusedLinear(ParameterInParts, Linear):
    """Linear layers of one input as one product: queries, keys and values, or a gate and what it gates.

        forward(input, activation="none", residual=None) = activation(input W^T + bias) + residual
        with `gated`                      activation(gate) up + residual, [gate, up] = input W^T + bias

    Args:
        in_features: K.
        parts: name of each layer -> its rows; the state_dict has `<name>.weight` [rows, K] and `<name>.bias`
            for each, so that it is that of the separate layers. {"": N} is one that a checkpoint has fused.
        bias: whether the layers have one.
        gated: whether the first half of the rows is the gate of the second.

    Raises:
        InputError: gated, and the rows are no two halves.
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], bias=True, device=None, dtype=None, *, gated=False
    ):
        rows = sum(parts.values())
        if gated and rows % 2:
            raise InputError(f"FusedLinear: gated, and parts = {dict(parts)} have no two halves")
        Linear.__init__(self, in_features, rows, bias, device, dtype)
        self.set_parts(parts)
        self.gated = gated

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        if not self.gated:
            return Linear.forward(self, input, activation, residual)
        hidden = ops.activation(Linear.forward(self, input), activation, gated=True)
        return hidden if residual is None else hidden + residual

    def to_packed(self) -> PackedLinear:
        return PackedLinear.of(self.weight, self.bias, parts=self.parts, gated=self.gated)

    def extra_repr(self):
        return f"{super().extra_repr()}, parts={self.parts}, gated={self.gated}"
