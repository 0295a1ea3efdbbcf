import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._packed import PackedModule, Product, initial_bias
from warpformer.ops._quantized import (
    INT4_FORMATS,
    INT8_FORMATS,
    check_format,
    check_quantized,
    dequantize,
    describe,
    layout,
    resolve_group_size,
)

KEYS = {"values": "qweight", "scales": "scales", "zeros": "zeros"}  # of a QuantizedWeight, in a state_dict


class QuantizedLinear(PackedModule):
    """What Int8Linear, Int4Linear and QuantizedGroupedLinear share. `scales_dtype` is that of the scales in
    the state_dict: packed, they have one of their own."""

    formats = ()
    rank = 2  # of the weight

    def __init__(self, weight: ops.QuantizedWeight | ops.PackedWeight, bias, parts, gated):
        self._check(weight)
        super().__init__(weight, bias, parts, gated)

    @classmethod
    def from_quantized(
        cls,
        weight: ops.QuantizedWeight | ops.PackedWeight,
        bias: nn.Parameter | None = None,
        *,
        parts=None,
        gated=False,
    ):
        """The layer of a weight that `warpformer.quantization.quantize` made, packed with `gated` or not yet.

        Raises:
            InputError: its tensors do not fit each other, or its format is that of another class.
        """
        layer = cls.__new__(cls)
        QuantizedLinear.__init__(layer, weight, bias, parts, gated)
        return layer

    def pack(self, weight):
        super().pack(weight)
        # quantize() makes no others.
        self.scales_dtype = torch.bfloat16 if isinstance(weight, ops.PackedWeight) else weight.scales.dtype

    @property
    def format(self) -> str:
        return self._layout.format

    @property
    def group_size(self) -> int:
        return self._layout.group_size

    @property
    def zero_points(self) -> bool:
        return self._layout.zero_points

    @property
    def quantized_weight(self) -> ops.QuantizedWeight:
        weight = ops.unpack_linear(self.packed_weight)
        return weight._replace(scales=weight.scales.to(self.scales_dtype))

    @property
    def weight(self) -> Tensor:
        return dequantize(self.quantized_weight)

    def extra_repr(self):
        return f"{super().extra_repr()}, format={self.format!r}"

    def weight_layout(self):
        tensors = layout(self.in_features, self.format, self.group_size, self.zero_points)
        return {KEYS[name]: ((columns,), dtypes) for name, (columns, dtypes) in tensors.items()}

    def weight_state(self):
        weight = self.quantized_weight
        return {key: getattr(weight, name) for name, key in KEYS.items() if getattr(weight, name) is not None}

    def load_weight(self, tensors, assign):
        weight = ops.QuantizedWeight(
            tensors["qweight"],
            tensors["scales"],
            tensors.get("zeros"),
            self.format,
            self.in_features,
            self.group_size,
        )
        self._check(weight)
        self.pack(weight)

    def _check(self, weight):
        name = type(self).__name__
        if weight.format not in self.formats:
            raise InputError(f"{name}: format = {weight.format!r} is none of {self.formats}")
        is_packed = isinstance(weight, ops.PackedWeight)
        values = weight.data if is_packed else weight.values
        if values.ndim != self.rank:
            raise InputError(f"{name}: values = {describe(values)} have not {self.rank} dimensions")
        if is_packed:
            return
        try:
            check_quantized(weight)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


def zero_weight(in_features, rows, device, format, group_size, zero_points):
    group_size = resolve_group_size(format, in_features, group_size)
    check_format(format, in_features, group_size, zero_points)
    tensors = {
        name: torch.zeros(*rows, columns, device=device, dtype=dtypes[0])
        for name, (columns, dtypes) in layout(in_features, format, group_size, zero_points).items()
    }
    scales = tensors["scales"].bfloat16()
    return ops.QuantizedWeight(
        tensors["values"], scales, tensors.get("zeros"), format, in_features, group_size
    )


class Int8Linear(Product, QuantizedLinear):
    """A linear layer whose weight is 8-bit integers with one scale for each output, or each group of a row.

        forward(input, activation="none", residual=None) = activation(input W^T + bias) + residual
        W[n, k] = scales[n, g] * qweight[n, k]      g = k // group_size

    The weight is held once, packed, and is 0 until a state_dict or `from_quantized` gives it; the input,
    not the weight, has a gradient. Shapes, dtypes and errors are those of `warpformer.ops.linear`.

    Args:
        format: "int8" computes with the activations as they are, "int8_dynamic" rounds them to 8 bits,
            with one scale for each token.
        group_size: in_features or -1 for one group a row; of "int8" also 32, 64 or 128.
        parts, gated: as in `PackedLinear`.

    Attributes:
        weight: [N, K] float32, the numbers that the integers stand for, made anew on every access.
        quantized_weight: the integers and scales, an ops.QuantizedWeight, unpacked on every access.

    The state_dict has, for each of `parts`, `qweight` int8 [N, K], `scales` [N, groups] and `bias` [N].
    """

    formats = INT8_FORMATS

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        format="int8",
        group_size=-1,
        parts=None,
        gated=False,
    ):
        super().__init__(
            zero_weight(in_features, (out_features,), device, format, group_size, False),
            initial_bias(in_features, out_features, device, dtype) if bias else None,
            parts,
            gated,
        )


class Int4Linear(Product, QuantizedLinear):
    """A linear layer whose weight is 4-bit codes with one scale for each group of a row.

        forward(input, activation="none", residual=None) = activation(input W^T + bias) + residual
        W[n, k] = scales[n, g] * (code[n, k] - zeros[n, g])      g = k // group_size, 8 without zero points
        W[n, k] = scales[n, g] * NF4[code[n, k]]                 nf4

    The weight is held once, packed, and is 0 until a state_dict or `from_quantized` gives it; the input,
    not the weight, has a gradient. Shapes, dtypes and errors are those of `warpformer.ops.linear`.

    Args:
        format: "int4" and "nf4" compute with the activations as they are, "int4_dynamic" rounds them to 8
            bits, with one scale for each 32 of a token.
        group_size: 32, 64, 128, or in_features or -1 for one group a row.
        zero_points: whether groups have an integer zero (not nf4).
        parts, gated: as in `PackedLinear`.

    Attributes:
        weight: [N, K] float32, the numbers that the codes stand for, made anew on every access.
        quantized_weight: codes, scales and zeros, an ops.QuantizedWeight, unpacked on every access.

    The state_dict has, for each of `parts`, `qweight` uint8 [N, ceil(K / 2)] with the even column in the low
    half of a byte, `scales` [N, groups], `zeros` uint8 [N, groups] where there are zero points, `bias` [N].
    """

    formats = INT4_FORMATS

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        format="int4",
        group_size=128,
        zero_points=False,
        parts=None,
        gated=False,
    ):
        super().__init__(
            zero_weight(in_features, (out_features,), device, format, group_size, zero_points),
            initial_bias(in_features, out_features, device, dtype) if bias else None,
            parts,
            gated,
        )


def quantized_linear(weight: ops.QuantizedWeight, bias, parts=None, gated=False) -> QuantizedLinear:
    """The layer of the class that holds weights of that format."""
    cls = Int8Linear if weight.format in INT8_FORMATS else Int4Linear
    return cls.from_quantized(weight, bias, parts=parts, gated=gated)
