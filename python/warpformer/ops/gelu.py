import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import executor, is_direct, register


def gelu(input: Tensor, *, approximate: str = "none", bias: Tensor | None = None) -> Tensor:
    """Gaussian error linear unit, with the bias addition fused.

        z = input + bias
        "none":  out = z Phi(z), Phi the distribution function of the normal distribution
        "tanh":  out = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))

    Args:
        input: [..., C], float32, bfloat16 or float16, any strides.
        approximate: "none" or "tanh".
        bias: [C]; 0 if None.

    Returns:
        A contiguous tensor of the shape and dtype of `input`.

    Raises:
        InputError: `bias` is not [C], a dtype is not floating point, `approximate` is neither.
        TypeError: an argument is not a tensor.

    Source: torch.nn.functional.gelu; Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)".
    """
    if is_direct(input, optional=(bias,)):
        return _gelu(input, bias, approximate)
    return torch.ops.warpformer.gelu(input, bias, approximate)


def _gelu(input, bias, approximate):
    out = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    x, y = (input, out) if input.ndim else (input[None], out[None])
    _C.gelu(x, bias, y, approximate, executor(x))
    return out


register(
    "gelu(Tensor input, Tensor? bias, str approximate) -> Tensor",
    _gelu,
    lambda input, bias, approximate: torch.empty(input.shape, dtype=input.dtype, device=input.device),
)
