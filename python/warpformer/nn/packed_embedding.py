import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._packed import PackedModule
from warpformer.ops._quantized import dequantize
from warpformer.ops.linear import PANEL


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
        packed = self.layer.packed_weight
        if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < packed.out_features:
            raise InputError(f"an id of input = {list(input.shape)} is not in 0..{packed.out_features - 1}")
        panels, place = torch.unique(input // PANEL, return_inverse=True)
        some = packed._replace(data=packed.data[panels], out_features=len(panels) * PANEL)
        rows, index = ops.unpack_linear(some), place * PANEL + input % PANEL
        if isinstance(rows, Tensor):
            return rows[index]
        values, scales, zeros = (t if t is None else t[index.flatten()] for t in rows[:3])
        picked = rows._replace(values=values, scales=scales, zeros=zeros)
        return dequantize(picked).view(*input.shape, packed.in_features)

    def extra_repr(self):
        return f"{self.layer.out_features}, {self.layer.in_features}"
