from collections.abc import Mapping

import torch
from torch import Tensor, nn

from warpformer._C import InputError
from warpformer.ops._quantized import FLOATS

WHOLE = ""  # the name of a part that is all of its layer


class StateInParts(nn.Module):
    """A weight and perhaps a bias, whose rows are those of several layers, `parts`, that a state_dict holds
    one by one: `<part>.weight`, or `weight` where the one part has no name.

    The weight of experts, [E, N, K], is one tensor without names, and with them one for each expert and
    part: `<expert>.<part>.weight`.

    Subclasses have `parts`, `bias`, `out_features` and `held`, and say what of a weight lies in a
    state_dict: `weight_layout`, `weight_state`, `load_weight`.
    """

    parts: dict[str, int]  # name -> rows
    out_features: int
    bias: nn.Parameter | None

    def set_parts(self, parts: Mapping[str, int] | None):
        """Without any, the layer is one part without a name.

        Raises:
            InputError: their rows are not those of the layer.
        """
        self.parts = {WHOLE: self.out_features} if parts is None else dict(parts)
        if sum(self.parts.values()) != self.out_features:
            raise InputError(f"parts = {self.parts} are not the {self.out_features} rows of the weight")

    @property
    def held(self) -> Tensor:
        """The tensor that holds the weight: [E, ...] that of experts, else of two dimensions."""
        raise NotImplementedError

    def weight_layout(self):
        """Name of each tensor of the weight -> (its shape after that of rows, the dtypes it may have)."""
        raise NotImplementedError

    def weight_state(self) -> dict[str, Tensor]:
        """Name of each tensor of the weight -> its rows, of all parts."""
        raise NotImplementedError

    def load_weight(self, tensors: dict[str, Tensor], assign: bool):
        """Takes what `weight_state` gave; without `assign` in the dtype that the layer has."""
        raise NotImplementedError

    def state_layout(self):
        """Key of the state_dict -> (shape, the dtypes it may have)."""
        return {key: value for keys in self.layout_by_tensor().values() for key, value in keys.items()}

    def layout_by_tensor(self):
        """Name of each tensor of the layer -> the part of `state_layout` that it is joined of."""
        return {
            kind: {key: ((*rows, *columns), dtypes) for key, rows in self._keys(kind).items()}
            for kind, (columns, dtypes) in self._layout_of_all().items()
        }

    def load_joined(self, tensors: dict[str, Tensor]):
        """Takes all that `layout_by_tensor` names, [rows of all parts, ...], in the dtypes that they have.

        Raises:
            InputError: they do not fit.
        """
        layout = self._layout_of_all()
        tensors = {kind: value.view(*self._rows, *layout[kind][0]) for kind, value in tensors.items()}
        bias = tensors.pop("bias", None)
        self.load_weight(tensors, assign=True)
        if bias is not None:
            self._load_parameter("bias", bias, assign=True)

    @property
    def _rows(self):
        """What shapes begin with: [N], or [E, N]."""
        return *self.held.shape[:-2], self.out_features

    @property
    def _is_cut(self):
        return [*self.parts] != [WHOLE]

    def _layout_of_all(self):
        bias = {} if self.bias is None else {"bias": ((), FLOATS)}
        return self.weight_layout() | bias

    def _keys(self, kind):
        """Key of each tensor of a kind -> the first dimensions of its shape."""
        if not self._is_cut:
            return {kind: self._rows}
        names = {f"{part}.{kind}": (rows,) for part, rows in self.parts.items()}
        if len(self._rows) == 1:
            return names
        return {f"{expert}.{name}": rows for expert in range(self._rows[0]) for name, rows in names.items()}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        tensors = self.weight_state()
        if self.bias is not None:
            tensors["bias"] = self.bias
        for kind, value in tensors.items():
            value, keys = value if keep_vars else value.detach(), self._keys(kind)
            if self._is_cut:
                rows = value.flatten(0, len(self._rows) - 1).split([count for (count,) in keys.values()])
            for key, part in zip(keys, rows if self._is_cut else [value], strict=True):
                destination[prefix + key] = part

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
        assign = metadata.get("assign_to_params_buffers", False) or self.held.is_meta
        weight = self._gather(self.weight_layout(), given, assign)
        if weight is not None:
            try:
                self.load_weight(weight, assign)
            except InputError as error:
                errors.append(f"{prefix}weight: {error}")
        if (
            self.bias is not None
            and (bias := self._gather({"bias": ((), FLOATS)}, given, assign)) is not None
        ):
            self._load_parameter("bias", bias["bias"], assign)

    def _gather(self, layout, given, assign):
        """The tensors in `layout`, their parts below each other; None if a part is not given."""
        if not all(key in given for kind in layout for key in self._keys(kind)):
            return None
        tensors = {
            kind: torch.cat([given[key] for key in self._keys(kind)]).view(*self._rows, *columns)
            for kind, (columns, _) in layout.items()
        }
        return tensors if assign else {kind: value.to(self.held.device) for kind, value in tensors.items()}

    def _load_parameter(self, name, value, assign):
        parameter = getattr(self, name)
        if assign:
            setattr(self, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        else:
            with torch.no_grad():
                parameter.copy_(value)


class ParameterInParts(StateInParts):
    """StateInParts of a layer that trains: the weight is the parameter `weight`."""

    @property
    def held(self):
        return self.weight

    def weight_layout(self):
        return {"weight": ((self.in_features,), FLOATS)}

    def weight_state(self):
        return {"weight": self.weight}

    def load_weight(self, tensors, assign):
        self._load_parameter("weight", tensors["weight"], assign)
