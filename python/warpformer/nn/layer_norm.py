from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._drop_in import drop_in


@drop_in
class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm on `warpformer.ops.layer_norm`, with the residual addition fused.

        forward(input, residual=None) = normalize(input + residual) * weight + bias

    Constructor, parameters and state_dict are torch's; shapes, dtypes, gradients and errors the op's.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual
        )


class OffsetLayerNorm(LayerNorm):
    """LayerNorm whose weight is 1 more than its parameter: Nemotron's layernorm1p.

        forward(input, residual=None) = normalize(input + residual) * (1 + weight) + bias

    1 + weight is float32, whatever the dtype of the parameter, which is 0 at first.
    """

    def reset_parameters(self):
        super().reset_parameters()
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = self.weight.float() + 1
        return ops.layer_norm(input, self.normalized_shape, weight, self.bias, self.eps, residual=residual)
