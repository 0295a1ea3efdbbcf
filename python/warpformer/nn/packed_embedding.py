from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._packed import PackedModule
from warpformer.ops._quantized import dequantize


class PackedEmbedding(nn.Module):
    """The embedding of tokens whose table is also the weight of the output layer, which alone holds it.

        forward(input) = weight[input]

    Args:
        layer: a PackedLinear [C] to [V]; it is no submodule of this one.

    Args of forward:
        input: [...] int64 or int32.

    Returns:
        [..., C], in the dtype of the weight.

    Raises:
        InputError: an id is outside the table.

    Source: Press and Wolf, "Using the Output Embedding to Improve Language Models".
    """

    def __init__(self, layer: PackedModule):
        super().__init__()
        self._layer = (layer,)  # in a tuple, which torch does not look into

    @property
    def layer(self) -> PackedModule:
        return self._layer[0]

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:
        rows = ops.unpack_linear(self.layer.packed_weight, rows=input.flatten())
        rows = rows if isinstance(rows, Tensor) else dequantize(rows)
        return rows.view(*input.shape, self.layer.in_features)

    def extra_repr(self):
        return f"{self.layer.out_features}, {self.layer.in_features}"
