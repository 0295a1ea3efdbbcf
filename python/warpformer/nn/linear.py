from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from warpformer import ops
from warpformer.nn._drop_in import DROP_INS, drop_in
from warpformer.nn._repack import Repacking
from warpformer.nn.packed_linear import PackedLinear


@drop_in
class Linear(Repacking, nn.Linear):
    """torch.nn.Linear on `warpformer.ops.linear`, with an activation and the residual addition fused.

        forward(input, activation="none", residual=None) = activation(input W^T + bias) + residual

    Constructor, parameters, initialization and state_dict are torch's; shapes, dtypes, gradients and errors
    the op's. While the weight gets no gradient its packed form is kept beside it; see `repack_`. PackedLinear
    holds that alone, for inference.
    """

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return ops.linear(input, self.weight, self.bias, activation=activation, residual=residual)

    def to_packed(self) -> PackedLinear:
        """This layer for inference."""
        return PackedLinear.of(self.weight, self.bias)


DROP_INS[NonDynamicallyQuantizableLinear] = Linear  # the output of torch.nn.MultiheadAttention
