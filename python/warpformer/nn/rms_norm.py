from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._drop_in import drop_in


@drop_in
class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm on `warpformer.ops.rms_norm`, with the residual addition fused.

        forward(input, residual=None) = normalize(input + residual) * weight

    Constructor, parameters and state_dict are torch's; shapes, dtypes, gradients and errors the op's.
    """

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.rms_norm(input, self.normalized_shape, self.weight, self.eps, residual=residual)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm whose weight is 1 more than its parameter, as Gemma has it.

        forward(input, residual=None) = normalize(input + residual) * (1 + weight)

    1 + weight is float32, whatever the dtype of the parameter, which is 0 at first.
    """

    def reset_parameters(self):
        nn.init.zeros_(self.weight)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.rms_norm(
            input, self.normalized_shape, self.weight.float() + 1, self.eps, residual=residual
        )
