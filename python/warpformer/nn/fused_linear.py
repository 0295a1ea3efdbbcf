from collections.abc import Mapping

import torch
from torch import Tensor

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._parts import part_keys, split_parts
from warpformer.nn.linear import Linear
from warpformer.nn.packed_linear import PackedLinear
from warpformer.ops._quantized import FLOATS


class FusedLinear(Linear):
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
        super().__init__(in_features, rows, bias, device, dtype)
        self.parts = dict(parts)
        self.gated = gated

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        if not self.gated:
            return super().forward(input, activation, residual)
        hidden = ops.activation(super().forward(input), activation, gated=True)
        return hidden if residual is None else hidden + residual

    def to_packed(self) -> PackedLinear:
        return PackedLinear.of(self.weight, self.bias, parts=self.parts, gated=self.gated)

    def state_layout(self):
        """Key of the state_dict -> (shape, the dtypes it may have)."""
        shapes = {"weight": (self.in_features,)} | ({} if self.bias is None else {"bias": ()})
        return {
            key: ((rows, *columns), FLOATS)
            for kind, columns in shapes.items()
            for key, rows in zip(part_keys(self.parts, kind), self.parts.values(), strict=True)
        }

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for kind, value in self._parameters.items():
            if value is not None:
                rows = split_parts(self.parts, kind, value if keep_vars else value.detach())
                destination.update({prefix + key: part for key, part in rows.items()})

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        layout = self.state_layout()
        unexpected += [key for key in state if key.startswith(prefix) and key[len(prefix) :] not in layout]
        whole = {}
        for kind in ("weight", "bias")[: 1 + (self.bias is not None)]:
            keys = [prefix + key for key in part_keys(self.parts, kind)]
            absent = [key for key in keys if key not in state]
            missing += absent
            if not absent:
                whole[prefix + kind] = torch.cat([state[key] for key in keys])
        ignored = []
        super()._load_from_state_dict(whole, prefix, metadata, strict, ignored, ignored, errors)

    def extra_repr(self):
        return f"{super().extra_repr()}, parts={self.parts}, gated={self.gated}"
