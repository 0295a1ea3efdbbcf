from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._drop_in import drop_in


@drop_in
class Dropout(nn.Dropout):
    """torch.nn.Dropout on `warpformer.ops.dropout`.

        forward(input) = input / (1 - p) where a random number of the element is at least p, 0 elsewhere

    Constructor and behaviour are torch's; the random numbers are those of the op, the same on every device.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        out = ops.dropout(input, self.p)
        return input.copy_(out) if self.inplace else out
