import torch
from torch import Tensor, nn

from warpformer import ops


class Linear(nn.Module):
    """torch.nn.Linear for inference: the weight is held once, packed as the kernel reads it.

        forward(input, activation="none", residual=None) = activation(input W^T + bias) + residual

    Constructor, `in_features`, `out_features`, `weight` [N, K], `bias` [N] and state_dict are those of
    torch.nn.Linear; `weight` is unpacked on every access and has no gradient. Shapes, dtypes and errors
    are those of `warpformer.ops.linear`.

    Args:
        parts: names of layers whose weights lie one below the other in this one, each of out_features /
            len(parts) rows; the state_dict then has `<name>.weight` and `<name>.bias` for each, so that a
            fused query-key-value layer loads from a checkpoint that holds three.
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, parts=("",)):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.parts = parts
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        if not weight.is_meta:
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.register_buffer("packed", None, persistent=False)
        self._pack(weight)
        self.bias = None
        if bias:
            bound = in_features**-0.5 if in_features else 0.0
            values = torch.empty(out_features, device=device, dtype=dtype).uniform_(-bound, bound)
            self.bias = nn.Parameter(values, requires_grad=False)

    def _pack(self, weight: Tensor):
        self.packed, *_, self.format = ops.pack_linear(weight)[:4]

    @property
    def packed_weight(self) -> ops.PackedWeight:
        return ops.PackedWeight(self.packed, self.out_features, self.in_features, self.format)

    @property
    def weight(self) -> Tensor:
        return ops.unpack_linear(self.packed_weight)

    def forward(self, input: Tensor, activation: str = "none", residual: Tensor | None = None) -> Tensor:
        return ops.linear(input, self.packed_weight, self.bias, activation=activation, residual=residual)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )

    def state_keys(self, kind):
        """Names of the checkpoint's weights or biases (kind "weight" or "bias"), with their shapes."""
        rows = self.out_features // len(self.parts)
        shape = (rows, self.in_features) if kind == "weight" else (rows,)
        return {f"{part}.{kind}" if part else kind: shape for part in self.parts}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for kind, value in (("weight", self.weight), ("bias", self.bias)):
            if value is None:
                continue
            keys = self.state_keys(kind)
            for key, rows in zip(keys, value.detach().chunk(len(keys)), strict=True):
                destination[prefix + key] = rows

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        known = set()
        for kind in ("weight", "bias") if self.bias is not None else ("weight",):
            keys = self.state_keys(kind)
            known |= {prefix + key for key in keys}
            rows = []
            for key, shape in keys.items():
                value = state.get(prefix + key)
                if value is None:
                    missing.append(prefix + key)
                elif tuple(value.shape) != shape:
                    errors.append(f"{prefix + key} has shape {list(value.shape)}, not {list(shape)}")
                else:
                    rows.append(value.detach())
            if len(rows) < len(keys):
                continue
            value = torch.cat(rows)
            if kind == "weight":
                self._pack(value)
            else:
                self.bias = nn.Parameter(value, requires_grad=False)
        unexpected += [key for key in state if key.startswith(prefix) and key not in known]
