from collections.abc import Mapping

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._parts import WHOLE, part_keys, split_parts
from warpformer.ops._quantized import FLOATS
from warpformer.ops.linear import PANEL


class PackedModule(nn.Module):
    """What PackedLinear, Int8Linear and Int4Linear are: one packed weight, and a state_dict that unpacks it.

    Subclasses say what of a weight lies in a state_dict: `weight_layout`, `weight_state`, `load_weight`.
    """

    def __init__(
        self,
        weight: Tensor | ops.QuantizedWeight,
        bias: nn.Parameter | None,
        parts: Mapping[str, int] | None,
        gated: bool,
    ):
        super().__init__()
        self.register_buffer("packed", None, persistent=False)
        self.gated = gated
        self.pack(weight)
        self.in_features = self._layout.in_features
        self.out_features = self._layout.out_features
        self.bias = bias
        self.parts = {WHOLE: self.out_features} if parts is None else dict(parts)
        if sum(self.parts.values()) != self.out_features:
            raise InputError(f"parts = {self.parts} are not the {self.out_features} rows of the weight")

    def pack(self, weight: Tensor | ops.QuantizedWeight):
        """Holds `weight` from now on."""
        packed = ops.pack_linear(weight, gated=self.gated)
        self.packed = packed.data
        self._layout = packed._replace(data=None)

    @property
    def packed_weight(self) -> ops.PackedWeight:
        return self._layout._replace(data=self.packed)

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return ops.linear(input, self.packed_weight, self.bias, activation=activation, residual=residual)

    def forward_rows(self, input: Tensor, begin: int, end: int) -> Tensor:
        """The outputs from `begin` to before `end`."""
        if begin % PANEL:
            return self(input)[..., begin:end]
        bias = None if self.bias is None else self.bias[begin:end]
        return ops.linear(input, self.packed_weight, bias, rows=(begin, end))

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def weight_layout(self):
        """Name of each tensor of the weight -> (its shape after that of rows, the dtypes it may have)."""
        raise NotImplementedError

    def weight_state(self) -> dict[str, Tensor]:
        """Name of each tensor of the weight -> its rows, of all parts."""
        raise NotImplementedError

    def load_weight(self, tensors: dict[str, Tensor], assign: bool):
        """Packs what `weight_state` gave; without `assign` in the dtype that the layer has."""
        raise NotImplementedError

    def state_layout(self):
        """Key of the state_dict -> (shape, the dtypes it may have)."""
        return {
            key: ((rows, *columns), dtypes)
            for kind, (columns, dtypes) in self._layout_of_all().items()
            for key, rows in zip(part_keys(self.parts, kind), self.parts.values(), strict=True)
        }

    def _layout_of_all(self):
        bias = {} if self.bias is None else {"bias": ((), FLOATS)}
        return self.weight_layout() | bias

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        tensors = self.weight_state()
        if self.bias is not None:
            tensors["bias"] = self.bias if keep_vars else self.bias.detach()
        for kind, value in tensors.items():
            for key, rows in split_parts(self.parts, kind, value).items():
                destination[prefix + key] = rows

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        layout = self.state_layout()
        unexpected += [key for key in state if key.startswith(prefix) and key[len(prefix) :] not in layout]
        given = {}
        for key, (shape, dtypes) in layout.items():
            value = state.get(prefix + key)
            if value is None:
                missing.append(prefix + key)
            elif tuple(value.shape) != shape:
                errors.append(f"{prefix + key} has shape {list(value.shape)}, not {list(shape)}")
            elif value.dtype not in dtypes:
                errors.append(f"{prefix + key} has dtype {value.dtype}, not {' or '.join(map(str, dtypes))}")
            else:
                given[key] = value.detach()
        # On the meta device there is nothing to keep, neither dtype nor device.
        assign = metadata.get("assign_to_params_buffers", False) or self.packed.is_meta
        weight = self._gather(self.weight_layout(), given, assign)
        if weight is not None:
            try:
                self.load_weight(weight, assign)
            except InputError as error:
                errors.append(f"{prefix}weight: {error}")
        if self.bias is not None and (bias := self._gather(["bias"], given, assign)) is not None:
            self._load_bias(bias["bias"], assign)

    def _gather(self, kinds, given, assign):
        """The tensors of these kinds, their parts below each other; None if a part is not given."""
        keys = {kind: part_keys(self.parts, kind) for kind in kinds}
        if not all(key in given for each in keys.values() for key in each):
            return None
        tensors = {kind: torch.cat([given[key] for key in each]) for kind, each in keys.items()}
        return tensors if assign else {kind: value.to(self.packed.device) for kind, value in tensors.items()}

    def _load_bias(self, value, assign):
        if assign:
            self.bias = nn.Parameter(value, requires_grad=self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(value)


def initial_bias(in_features, out_features, device, dtype) -> nn.Parameter:
    """As torch.nn.Linear draws it, without gradient."""
    bound = in_features**-0.5 if in_features else 0.0
    values = torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound)
    return nn.Parameter(values, requires_grad=False)
