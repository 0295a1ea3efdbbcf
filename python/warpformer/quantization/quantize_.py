from collections.abc import Callable, Iterable
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn import (
    FusedLinear,
    GroupedLinear,
    Linear,
    MultiheadAttention,
    PackedEmbedding,
    PackedGroupedLinear,
    PackedLinear,
    QuantizedGroupedLinear,
)
from warpformer.nn.quantized_linear import QuantizedLinear, quantized_linear
from warpformer.ops._quantized import FORMATS, check_format, dequantize, resolve_group_size
from warpformer.quantization.quantize import as_matrices, chunks, quantize_packed

Skip = str | Iterable[str] | Callable[[str, nn.Module], bool]


class LayerReport(NamedTuple):
    """What `quantize_` did to one linear layer."""

    name: str
    shape: tuple[int, ...]  # of the weight, [N, K] or [E, N, K]
    bytes_before: int  # of the weight
    bytes_after: int
    error: float  # of the weight, relative Frobenius: |quantized - weight| / |weight|
    note: str  # why the layer was left as it is; empty where it was quantized


def quantize_(
    model: nn.Module,
    mode: str,
    group_size: int | None = None,
    *,
    skip: Skip = (),
    clip: str | None = None,
    zero_points: bool = False,
    tied: bool = False,
) -> list[LayerReport]:
    """Quantizes the linear layers of a model, in place.

    Every torch.nn.Linear and warpformer.nn.Linear (or subclass with their forward) and every PackedLinear
    becomes an Int8Linear or an Int4Linear, which keeps the bias as it is; every GroupedLinear and
    PackedGroupedLinear, the experts of a mixture, a QuantizedGroupedLinear. All layers change, or, where
    one cannot be quantized, none does.

    Args:
        model: any torch or warpformer module that holds linear layers, with its weights in float32,
            bfloat16 or float16.
        mode: "int8", "int8_dynamic", "int4", "int4_dynamic" or "nf4": see Int8Linear and Int4Linear.
        group_size, clip, zero_points: see `warpformer.quantization.quantize`.
        skip: names of layers to leave as they are, with * and ? as wildcards ("*.lm_head"), or a function
            (name, layer) -> whether to.
        tied: also quantizes layers whose weight is another module's too, as that of an output layer tied
            to the embedding: the layer then has a copy of its own.

    Returns:
        A LayerReport for each linear layer, in the order of the model. Layers with a note were left as
        they are: skipped, tied, with hooks, parametrized, or inside a torch.nn.MultiheadAttention, which
        reads the weight of its output layer itself.

    Raises:
        InputError: a weight is not finite, an option does not fit; the layer is named, and the model is as
            it was. Or `model` is itself the layer to replace.
    """
    plan = Plan(model, mode, group_size, skip=skip, clip=clip, zero_points=zero_points, tied=tied)
    if any(layer is model for layer in plan.layers.values()):
        raise InputError("quantize_: the model is itself a linear layer, which cannot be replaced in place")
    report, replacements = [], {}
    for name, layer in tqdm(plan.layers.items(), f"Quantizing to {mode}", unit="layer", disable=None):
        weight = layer.weight
        size, error, note = weight.nbytes, 0.0, plan.notes.get(name, "")
        if not note:
            replacement = replacements[layer] = plan.quantize(name)
            size, error = replacement.packed.nbytes, relative_error(weight, replacement.packed_weight)
        report.append(LayerReport(name, tuple(weight.shape), weight.nbytes, size, error, note))
    replace_layers(model, replacements)
    return report


class Plan:
    """Which layers of a model become what. The arguments are those of `quantize_`; weights are not read yet.

    Attributes:
        layers: name -> linear layer, in the order of the model; one with several names has its first.
        notes: name of each layer to leave as it is -> why.
    """

    def __init__(
        self, model, mode, group_size=None, *, skip: Skip = (), clip=None, zero_points=False, tied=False
    ):
        if mode not in FORMATS:
            raise InputError(f"mode = {mode!r} is none of {FORMATS}")
        if clip not in (None, "mse"):
            raise InputError(f"clip = {clip!r} is neither None nor 'mse'")
        self.mode = mode
        self.options = dict(group_size=group_size, clip=clip, zero_points=zero_points)
        self.layers = dict(_linears(model))
        for name, layer in self.layers.items():
            if isinstance(layer, nn.LazyLinear):
                raise InputError(f"{name}: a LazyLinear has no weight before its first call")
        self.notes = _notes(model, self.layers, skip, tied)
        for name, layer in self.layers.items():
            if name not in self.notes:
                with _naming(name):
                    size = resolve_group_size(mode, layer.in_features, group_size)
                    check_format(mode, layer.in_features, size, zero_points)

    def quantize(self, name: str) -> QuantizedLinear:
        """What replaces a layer."""
        layer = self.layers[name]
        gated = getattr(layer, "gated", False)
        with _naming(name):
            packed = quantize_packed(layer.weight, self.mode, gated=gated, **self.options)
        return with_weight(layer, packed, layer.bias).train(layer.training)


def with_weight(layer, weight: ops.QuantizedWeight | ops.PackedWeight, bias) -> QuantizedLinear:
    """A linear layer with a quantized weight in the place of its own."""
    options = {key: getattr(layer, key) for key in ("parts", "gated") if hasattr(layer, key)}
    if isinstance(layer, GroupedLinear | PackedGroupedLinear):
        return QuantizedGroupedLinear.from_quantized(weight, bias, **options)
    return quantized_linear(weight, bias, **options)


@contextmanager
def _naming(name):
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _linears(model):
    """(name, linear layer) of all there are. That of the in_proj_weight of an attention is made for this."""
    for name, module in model.named_modules():
        if _is_linear(module):
            yield name, module
        elif isinstance(module, MultiheadAttention) and module.in_proj_weight is not None:
            width = module.embed_dim
            layer = Linear(width, 3 * width, device="meta")
            layer.weight, layer.bias = module.in_proj_weight, module.in_proj_bias
            yield f"{name}.in_proj" if name else "in_proj", layer.train(module.training)


def _is_linear(module):
    forwards = (nn.Linear.forward, Linear.forward, FusedLinear.forward, GroupedLinear.forward)
    return type(module) in (PackedLinear, PackedGroupedLinear) or (
        isinstance(module, nn.Linear | GroupedLinear) and type(module).forward in forwards
    )


def _notes(model, layers, skip, tied):
    names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    matches = _matcher(skip)
    heads = {m.out_proj for m in model.modules() if _is_torch(m, nn.MultiheadAttention)}
    owners = {} if tied else _owners_of_weights(model)
    tables = {} if tied else _tables(model)
    notes = {}
    for name, layer in layers.items():
        others = owners.get(_identity(layer), [])
        if any(matches(each, layer) for each in names.get(layer, [name])):
            notes[name] = "skipped"
        elif layer in heads:
            notes[name] = "torch.nn.MultiheadAttention reads its weight"
        elif parametrize.is_parametrized(layer):
            notes[name] = "its weight is parametrized"
        elif "forward" in vars(layer):
            notes[name] = "its forward is not torch's"
        elif any(value for key, value in vars(layer).items() if key.endswith("_hooks")):
            notes[name] = "it has hooks"
        elif layer in tables:
            notes[name] = f"its weight is also that of {tables[layer]}"
        elif len(others) > 1:
            notes[name] = "its weight is also that of " + next(each for each in others if each != name)
    return notes


def _matcher(skip):
    if callable(skip):
        return skip
    patterns = [skip] if isinstance(skip, str) else list(skip)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise InputError(f"skip = {skip!r} is neither names nor a function")
    return lambda name, layer: any(fnmatchcase(name, pattern) for pattern in patterns)


def _owners_of_weights(model):
    """Identity of each parameter's memory -> names of the modules that hold it."""
    owners = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(name)
    return owners


def _tables(model):
    """Layer whose packed weight is the table of an embedding -> the name of that."""
    return {
        module.layer: name for name, module in model.named_modules() if isinstance(module, PackedEmbedding)
    }


def _identity(layer):
    return _memory(layer.weight) if isinstance(layer, nn.Linear | GroupedLinear) else None


def _memory(parameter):
    return parameter.data_ptr() or id(parameter)  # on the meta device no parameter has an address


@torch.no_grad()
def relative_error(weight: Tensor, packed: ops.PackedWeight) -> float:
    """|dequantized - weight| / |weight|, Frobenius norms; 0 for a weight of zeros."""
    wrong, whole = 0.0, 0.0
    matrices = as_matrices(weight, packed.gated)
    data = packed.data.view(len(matrices), -1, packed.data.shape[-1])
    for i, rows, panels in chunks(matrices):
        exact = matrices[i, rows].double()
        some = packed._replace(data=data[i, panels], out_features=len(exact), gated=False)
        wrong += (dequantize(ops.unpack_linear(some)) - exact).square_().sum().item()
        whole += exact.square().sum().item()
    return (wrong / whole) ** 0.5 if whole else 0.0


def replace_layers(model: nn.Module, replacements: dict[nn.Module, QuantizedLinear]) -> None:
    """Puts each replacement wherever its layer is."""
    projections = {
        layer.weight: replacement
        for layer, replacement in replacements.items()
        if isinstance(layer, nn.Linear)
    }
    for parent in list(model.modules()):
        if isinstance(parent, MultiheadAttention) and parent.in_proj_weight in projections:
            parent.set_in_proj(projections[parent.in_proj_weight])
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    for module in model.modules():
        leave_fast_path(module)


def leave_fast_path(module):
    """torch's fused inference path of these reads the weights of the linear layers inside."""
    if not any(isinstance(each, QuantizedLinear) for each in module.modules()):
        return
    if _is_torch(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    elif _is_torch(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def _is_torch(module, cls):
    return isinstance(module, cls) and type(module).forward is cls.forward
