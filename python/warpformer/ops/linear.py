import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import empty, executor, is_direct, register

PANEL = 16


def pack_linear(weight: Tensor) -> Tensor:
    """Rearranges the weight of a linear layer into the panels that `linear` reads.

        packed[p, k, j] = weight[16 p + j, k], 0 past the last row

    Args:
        weight: [N, K], float32, bfloat16 or float16, any strides.

    Returns:
        [ceil(N / 16), K, 16] float32. `unpack_linear(packed, N)` gives the weight back.

    Raises:
        InputError: `weight` is not a floating point matrix.
        TypeError: `weight` is not a tensor.

    Source: Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication".
    """
    if is_direct(weight):
        return _pack_linear(weight)
    return torch.ops.warpformer.pack_linear(weight)


def unpack_linear(packed: Tensor, out_features: int) -> Tensor:
    """The weight that `pack_linear` made `packed` of.

        weight[n, k] = packed[n // 16, k, n % 16]

    Args:
        packed: [ceil(N / 16), K, 16] float32.
        out_features: N.

    Returns:
        [N, K] float32, contiguous.

    Raises:
        InputError: `packed` is not of that shape.
        TypeError: `packed` is not a tensor.

    Source: the layout in csrc/linear/op.h.
    """
    is_direct(packed)
    panels = (out_features + PANEL - 1) // PANEL
    if packed.ndim != 3 or packed.shape[0] != panels or packed.shape[2] != PANEL or out_features < 0:
        raise _C.InputError(
            f"unpack_linear: packed.shape = {list(packed.shape)} does not hold out_features = {out_features}"
        )
    return packed.transpose(1, 2).flatten(0, 1)[:out_features].contiguous()


def linear(
    input: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Linear layer on a packed weight, with bias, activation and residual addition in its epilogue.

        out = activation(input W^T + bias) + residual

    Args:
        input: [..., K], float32, bfloat16 or float16, any strides.
        packed: W [N, K] as `pack_linear` returns it.
        out_features: N.
        bias: [N]; 0 if None.
        activation: the name of a function of `ops.activation`.
        residual: [..., N]; 0 if None.

    Returns:
        [..., N], contiguous, in the dtype of `input`.

    Raises:
        InputError: a shape or dtype does not fit, or the activation is not known.
        TypeError: an argument is not a tensor.

    Every element is one sum over K in ascending order, in float32: a row gives the same bits alone and
    in any batch. Source: torch.nn.functional.linear; Goto and van de Geijn, "Anatomy of
    High-Performance Matrix Multiplication".
    """
    if is_direct(input, packed, optional=(bias, residual)):
        return _linear(input, packed, out_features, bias, activation, residual)
    return torch.ops.warpformer.linear(input, packed, out_features, bias, activation, residual)


def _pack_linear(weight):
    if weight.ndim != 2:
        raise _C.InputError(f"pack_linear: weight.shape = {list(weight.shape)} is not [N, K]")
    packed = _empty_packed(weight)
    _C.pack_linear(weight, packed, executor(weight))
    return packed


def _empty_packed(weight):
    rows, depth = weight.shape
    return empty(((rows + PANEL - 1) // PANEL, depth, PANEL), weight, torch.float32)


def _linear(input, packed, out_features, bias, activation, residual):
    if out_features < 0:
        raise _C.InputError(f"linear: out_features = {out_features} is negative")
    out = _empty_product(input, out_features)
    x, y = (input, out) if input.ndim else (input[None], out[None])
    _C.linear(x, packed, bias, residual, y, activation, executor(input))
    return out


def _empty_product(input, out_features):
    return empty((*input.shape[:-1], out_features), input)


register("pack_linear(Tensor weight) -> Tensor", _pack_linear, _empty_packed)
register(
    "linear(Tensor input, Tensor packed, SymInt out_features, Tensor? bias, str activation, "
    "Tensor? residual) -> Tensor",
    _linear,
    lambda input, packed, out_features, bias, activation, residual: _empty_product(input, out_features),
)
