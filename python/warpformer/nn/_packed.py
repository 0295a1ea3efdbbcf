from collections.abc import Mapping

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._parts import StateInParts
from warpformer.ops.linear import PANEL, _cut_halves, _pad_halves, padding_of_halves


class PackedModule(StateInParts):
    """What packed and quantized layers hold: one packed weight, and a state_dict that unpacks it."""

    def __init__(
        self,
        weight: Tensor | ops.QuantizedWeight | ops.PackedWeight,
        bias: nn.Parameter | None,
        parts: Mapping[str, int] | None,
        gated: bool,
    ):
        super().__init__()
        self.register_buffer("packed", None, persistent=False)
        self.gated = gated
        self.pack(weight)
        self.in_features = self._layout.in_features
        self.out_features = self._layout.out_features
        self.bias = bias
        self.set_parts(parts)

    def pack(self, weight: Tensor | ops.QuantizedWeight | ops.PackedWeight):
        """Holds `weight` from now on."""
        is_packed = isinstance(weight, ops.PackedWeight)
        packed = weight if is_packed else ops.pack_linear(weight, gated=self.gated)
        self.packed = packed.data
        self._layout = packed._replace(data=None)

    def _apply(self, fn, recurse=True):
        before = self.packed_weight
        super()._apply(fn, recurse)
        kinds = before.data.device.type, self.packed.device.type
        if kinds in (("cpu", "cuda"), ("cuda", "cpu")):  # which do not pack alike
            weight = ops.unpack_linear(before)
            if isinstance(weight, Tensor):
                weight = weight.to(self.packed.device)
            else:
                tensors = [t if t is None else t.to(self.packed.device) for t in weight[:3]]
                weight = ops.QuantizedWeight(*tensors, *weight[3:])
            dtype = getattr(self, "scales_dtype", None)
            self.pack(weight)
            if dtype is not None:
                self.scales_dtype = dtype
        return self

    @property
    def held(self):
        return self.packed

    @property
    def packed_weight(self) -> ops.PackedWeight:
        return self._layout._replace(data=self.packed)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


class Product(nn.Module):
    """What a PackedModule of one matrix does."""

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return ops.linear(input, self.packed_weight, self.bias, activation=activation, residual=residual)

    def before_gate(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., N] input W^T + bias + residual: what a gated layer makes its output of."""
        if not self.gated:
            return self(input, residual=residual)
        half = self.out_features // 2
        padding = padding_of_halves(self.packed, half)
        packed = self.packed_weight._replace(out_features=2 * (half + padding), gated=False)
        bias, residual = (None if t is None else _pad_halves(t, padding) for t in (self.bias, residual))
        out = ops.linear(input, packed, bias, residual=residual)
        return _cut_halves(out, half) if padding else out

    def forward_rows(self, input: Tensor, begin: int, end: int) -> Tensor:
        """The outputs from `begin` to before `end`."""
        if begin % PANEL:
            return self(input)[..., begin:end]
        bias = None if self.bias is None else self.bias[begin:end]
        return ops.linear(input, self.packed_weight, bias, rows=(begin, end))


def initial_bias(in_features, shape, device, dtype) -> nn.Parameter:
    """As torch.nn.Linear draws it, without gradient."""
    bound = in_features**-0.5 if in_features else 0.0
    values = torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound)
    return nn.Parameter(values, requires_grad=False)
