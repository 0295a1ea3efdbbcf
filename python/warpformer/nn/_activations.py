"""Activation functions in the place of modules that compute them."""

from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._drop_in import is_plain


class Activation(nn.Module):
    """`ops.activation` of one kind."""

    kind: str

    def forward(self, input: Tensor) -> Tensor:
        return ops.activation(input, self.kind)


class GELU(Activation):
    kind = "gelu"


class GELUTanh(Activation):
    kind = "gelu_tanh"


class SiLU(Activation):
    kind = "silu"


class ReLU(Activation):
    kind = "relu"


class ReLUSquared(Activation):
    kind = "relu2"


def of_torch(module: nn.Module) -> type[Activation] | None:
    """Our class for an activation of torch.nn, if there is one."""
    if type(module) is nn.GELU:
        return GELUTanh if module.approximate == "tanh" else GELU
    if type(module) in (nn.SiLU, nn.ReLU) and not module.inplace:
        return SiLU if type(module) is nn.SiLU else ReLU
    return None


def fusible(module: nn.Module) -> str | None:
    """The kind of an activation that may be computed by its neighbour: it is one of these, without hooks."""
    return module.kind if isinstance(module, Activation) and is_plain(module) else None
