import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._packed import PackedModule, Product, initial_bias
from warpformer.ops._quantized import FLOATS


class FloatModule(PackedModule):
    """What PackedLinear and PackedGroupedLinear share: the packed weight is one of floats."""

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, *, parts=None, gated=False):
        """The layer that holds `weight` [N, K], or that of experts, packed, and `bias` as it is.

        Raises:
            InputError: `weight` is no floating tensor of these shapes, or `parts` are not its rows.
        """
        layer = cls.__new__(cls)
        PackedModule.__init__(layer, weight.detach(), bias, parts, gated)
        return layer

    @property
    def weight(self) -> Tensor:
        return ops.unpack_linear(self.packed_weight)

    def weight_layout(self):
        return {"weight": ((self.in_features,), FLOATS)}

    def weight_state(self):
        return {"weight": self.weight}

    def load_weight(self, tensors, assign):
        weight = tensors["weight"]
        self.pack(weight if assign else weight.to(self._dtype))

    def pack(self, weight):
        super().pack(weight)
        self._dtype = weight.dtype

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # The bytes of `packed` do not follow a change of dtype.
        dtype = fn(torch.empty(0, dtype=self._dtype, device=self.packed.device)).dtype
        if dtype != self._dtype:
            self.pack(self.weight.to(dtype))
        return self


class PackedLinear(Product, FloatModule):
    """torch.nn.Linear for inference: the weight is held once, packed as the kernel reads it.

        forward(input, activation="none", residual=None) = activation(input W^T + bias) + residual

    Constructor, `in_features`, `out_features`, `weight` [N, K], `bias` [N] and state_dict are those of
    torch.nn.Linear; `weight` is unpacked on every access and has no gradient. On a GPU, where products of
    dense weights are torch's, it is held as it is. Shapes, dtypes and errors are those of
    `warpformer.ops.linear`.

    Args:
        parts: name -> rows of layers whose weights lie one below the other in this one; the state_dict then
            has `<name>.weight` and `<name>.bias` for each, so that a fused query-key-value layer loads from
            a checkpoint that holds three.
        gated: whether the first half of the rows is the gate of the second: as in FusedLinear.
    """

    def __init__(
        self, in_features, out_features, bias=True, device=None, dtype=None, *, parts=None, gated=False
    ):
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        if not weight.is_meta:
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        bias = initial_bias(in_features, out_features, device, dtype) if bias else None
        super().__init__(weight, bias, parts, gated)
