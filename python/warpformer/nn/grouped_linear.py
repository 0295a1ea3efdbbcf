import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._packed import PackedModule, initial_bias
from warpformer.nn._parts import ParameterInParts
from warpformer.nn._repack import Repacking
from warpformer.nn.packed_linear import FloatModule
from warpformer.nn.quantized_linear import QuantizedLinear, zero_weight
from warpformer.ops._quantized import FORMATS


class _Experts:
    """What the layers here share."""

    rank = 3  # of the weight

    @property
    def num_experts(self) -> int:
        return self.held.shape[0]

    def extra_repr(self):
        of_linear = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        return f"num_experts={self.num_experts}, {of_linear}, gated={self.gated}"


class GroupedLinear(_Experts, Repacking, ParameterInParts):
    """A linear layer for each expert of a mixture, on `warpformer.ops.grouped_linear`.

        forward(input, offsets, activation="none") = activation(input W[e]^T + bias[e])
        forward(input, offsets, activation="none") = activation(gate) up                     gated
            [gate, up] = input W[e]^T + bias[e]

    where expert e has the rows [offsets[e - 1], offsets[e]) of `input` [M, K]. Shapes, dtypes, gradients and
    errors are the op's; every expert begins as a torch.nn.Linear does. PackedGroupedLinear and
    QuantizedGroupedLinear are what PackedLinear, Int8Linear and Int4Linear are to a linear layer.

    Args:
        num_experts, in_features, out_features: E, K and N. Of a gated layer N are the rows of gate and up.
        gated: whether the first half of the outputs is a gate of the second; forward then returns N / 2.
        parts: name -> rows of layers whose weights lie one below the other in each expert. The state_dict
            then has `<expert>.<name>.weight` [rows, K] and `<expert>.<name>.bias` for each; without parts
            `weight` and `bias` of all.

    Attributes:
        weight: [E, N, K].
        bias: [E, N] or None.
    """

    def __init__(
        self,
        num_experts,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        gated=False,
        parts=None,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.gated = gated
        self.set_parts(parts)
        shape = num_experts, out_features, in_features
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """As torch.nn.Linear draws them."""
        bound = self.in_features**-0.5 if self.in_features else 0.0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor, offsets: Tensor, activation: str = "none") -> Tensor:
        if self.gated and torch.is_grad_enabled():  # the input of the gate is kept, not computed again
            gate_up = ops.grouped_linear(input, self.weight, offsets, self.bias)
            return ops.activation(gate_up, activation, gated=True)
        options = {"activation": activation, "gated": self.gated}
        return ops.grouped_linear(input, self.weight, offsets, self.bias, **options)

    def to_packed(self) -> "PackedGroupedLinear":
        """This layer for inference."""
        return PackedGroupedLinear.of(self.weight, self.bias, parts=self.parts, gated=self.gated)


class _Packed(_Experts):
    def forward(self, input: Tensor, offsets: Tensor, activation: str = "none") -> Tensor:
        return ops.grouped_linear(input, self.packed_weight, offsets, self.bias, activation=activation)


class PackedGroupedLinear(_Packed, FloatModule):
    """GroupedLinear for inference: the weight is held once, packed as the kernel reads it.

        forward(input, offsets, activation="none")

    Constructor and state_dict are those of GroupedLinear; `weight` [E, N, K] is unpacked on every access and
    has no gradient. Shapes, dtypes and errors are those of `warpformer.ops.grouped_linear`.
    """

    def __init__(
        self,
        num_experts,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        gated=False,
        parts=None,
    ):
        layer = GroupedLinear(num_experts, in_features, out_features, bias, device, dtype)
        PackedModule.__init__(self, layer.weight.detach(), layer.bias, parts, gated)
        self.requires_grad_(False)


class QuantizedGroupedLinear(_Packed, QuantizedLinear):
    """The linear layers of experts, with weights of 8 or 4 bits.

        forward(input, offsets, activation="none")

    as GroupedLinear has it, of the weights of Int8Linear and Int4Linear, and with their attributes and
    state_dict, whose tensors begin with E or are one for each expert, as those of GroupedLinear. They are 0
    until a state_dict or `from_quantized` gives them; the input, not the weight, has a gradient.

    Args:
        num_experts, in_features, out_features, gated, parts: as in `GroupedLinear`.
        format: "int8", "int8_dynamic", "int4", "int4_dynamic" or "nf4".
        group_size, zero_points: as in `Int4Linear`; int8 has one group a row and no zero points.
    """

    formats = FORMATS

    def __init__(
        self,
        num_experts,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        format="int4",
        group_size=128,
        zero_points=False,
        gated=False,
        parts=None,
    ):
        rows = num_experts, out_features
        super().__init__(
            zero_weight(in_features, rows, device, format, group_size, zero_points),
            initial_bias(in_features, rows, device, dtype) if bias else None,
            parts,
            gated,
        )

    @classmethod
    def from_quantized(cls, weight: ops.QuantizedWeight, bias=None, *, gated=False, parts=None):
        """The layer of a weight [E, N, K] that `warpformer.quantization.quantize` made.

        Raises:
            InputError: its tensors do not fit each other, or it is not that of experts.
        """
        layer = cls.__new__(cls)
        QuantizedLinear.__init__(layer, weight, bias, parts, gated)
        return layer
