"""What encoder and decoder layers are made of. A layer with hooks is called alone, as torch does; others
are fused with their neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._activations import Activation
from warpformer.nn._drop_in import is_plain
from warpformer.nn._packed import PackedModule
from warpformer.nn.layer_norm import LayerNorm
from warpformer.nn.linear import Linear
from warpformer.nn.rms_norm import RMSNorm

FUNCTIONS = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    ops.relu: "relu",
    ops.gelu: "gelu",
    ops.silu: "silu",
}
MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Identity: "none"}


def activation_name(activation) -> str | None:
    """As `warpformer.ops.activation` calls it; None for a function of the user's."""
    if not isinstance(activation, nn.Module):
        return FUNCTIONS.get(activation)
    if not is_plain(activation):
        return None
    if isinstance(activation, Activation):
        return activation.kind
    if type(activation) is nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    return MODULES.get(type(activation))


def feed_forward(linear1, activation, dropout, linear2, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x))))"""
    name = activation_name(activation)
    if name is None:
        hidden = activation(linear1(x))
    elif isinstance(linear1, Linear | PackedModule) and is_plain(linear1) and not torch.is_grad_enabled():
        hidden = linear1(x, activation=name)
    else:  # with gradients the input of the activation is kept, not computed again
        hidden = ops.activation(linear1(x), name)
    return linear2(dropout(hidden))


def norm_of_sum(norm, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + y) and x + y"""
    if type(norm) is LayerNorm and is_plain(norm):
        weights = (norm.normalized_shape, norm.weight, norm.bias)
        return ops.layer_norm(x, *weights, norm.eps, residual=y, return_sum=True)
    if type(norm) is RMSNorm and is_plain(norm):
        return ops.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps, residual=y, return_sum=True)
    total = x + y
    return norm(total), total


def norm_alone_of_sum(norm, x: Tensor, y: Tensor) -> Tensor:
    """norm(x + y)"""
    if type(norm) in (LayerNorm, RMSNorm) and is_plain(norm):
        return norm(x, residual=y)
    return norm(x + y)
