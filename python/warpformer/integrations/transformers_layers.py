"""Layers of transformers on `ops`. Each takes the place of a class there in live modules: the same parameters
and attributes, another forward.

transformers copies its layers from model to model, so each serves all classes that have the code of the one
it is made for. Where an activation or a sum is fused with its neighbour and one of them has hooks, both are
called as they were.
"""

from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import activations
from transformers.models.bert.modeling_bert import BertIntermediate, BertOutput
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.t5 import modeling_t5 as t5
from transformers.pytorch_utils import Conv1D
from transformers.utils.import_utils import is_tracing

from warpformer import ops
from warpformer.integrations._same_code import has_code_of
from warpformer.integrations.transformers import NAME
from warpformer.nn import Linear, _activations
from warpformer.nn._activations import fusible
from warpformer.nn._blocks import norm_alone_of_sum
from warpformer.nn._drop_in import is_plain
from warpformer.nn._packed import PackedModule
from warpformer.nn._repack import Repacking
from warpformer.ops._kept import kept
from warpformer.ops._library import autocast_dtype

HALVES = (torch.float16, torch.bfloat16)
_CLASSES: dict[type, type] = {}  # of transformers -> ours


def replacement(module: nn.Module) -> type | None:
    """Our class for a module of transformers, if there is one."""
    return _activation(module) or _by_code(type(module))


@cache
def _by_code(cls):
    return next((ours for original, ours in _CLASSES.items() if has_code_of(cls, original)), None)


def _instead_of(original):
    def register(cls):
        _CLASSES[original] = cls
        return cls

    return register


def _activation(module):
    cls, act = type(module), getattr(module, "act", None)
    if cls is activations.GELUActivation and act is F.gelu:
        return _activations.GELU
    if cls is activations.GELUTanh and isinstance(act, partial):
        return _activations.GELUTanh
    return {
        activations.NewGELUActivation: _activations.GELUTanh,
        activations.FastGELUActivation: _activations.GELUTanh,
        activations.SiLUActivation: _activations.SiLU,
        activations.ReLUSquaredActivation: _activations.ReLUSquared,
    }.get(cls)


@_instead_of(LlamaRMSNorm)
class RMSNorm(nn.Module):
    """weight x / sqrt(mean x^2 + eps), rounded once: theirs is rounded before the multiplication, too."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return ops.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@_instead_of(t5.T5LayerNorm)
class T5LayerNorm(RMSNorm):
    """The same in the dtype of the weight, where that is a half."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        out = super().forward(hidden_states)
        return out.to(self.weight.dtype) if self.weight.dtype in HALVES else out


@_instead_of(GemmaRMSNorm)
class UnitOffsetRMSNorm(nn.Module):
    """(1 + weight) x / sqrt(mean x^2 + eps), the factor in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.shape, 1 + self.weight.float(), self.eps)


def _packed_mT(weight, x):
    """The pack of the transpose of a parameter, for products with `x`, made once."""
    dtype = autocast_dtype(x) or weight.dtype
    return kept(weight, ("mT", dtype), lambda: ops.pack_linear(weight.detach().to(dtype).mT))


@_instead_of(Conv1D)
class TransposedLinear(Repacking):
    """x weight + bias with a weight [K, N], whose pack is kept as that of wf.nn.Linear is."""

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        weight = self.weight.mT if trains or is_tracing(x) else _packed_mT(self.weight, x)
        return ops.linear(x, weight, self.bias, activation=activation)


def _activated(linear, activation, x):
    """activation(linear(x)). In one call where no gradient needs what lies between."""
    kind = fusible(activation)
    takes_it = isinstance(linear, Linear | PackedModule | TransposedLinear) and is_plain(linear)
    if kind and takes_it and not torch.is_grad_enabled():
        return linear(x, activation=kind)
    return activation(linear(x))


def _gated(activation, gate, up):
    kind = fusible(activation)
    return ops.activation(gate, kind, up=up) if kind else activation(gate) * up


@_instead_of(LlamaMLP)
class GatedMLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))


@_instead_of(Phi3MLP)
class JoinedGatedMLP(nn.Module):
    """Gate and up are one layer."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(hidden_states)
        if kind := fusible(self.activation_fn):
            return self.down_proj(ops.activation(gate_up, kind, gated=True))
        gate, up = gate_up.chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


@_instead_of(MixtralExperts)
class Experts(Repacking):
    """The experts of a mixture, all in two products. transformers' own where they are spread over devices."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        kind = fusible(self.act_fn)
        if not kind or self._is_expert_parallel or is_tracing(hidden_states):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        experts, order = top_k_index.flatten().sort(stable=True)
        ends = experts.bincount(minlength=self.num_experts).cumsum(0)
        rows = hidden_states[order // top_k_index.shape[1]]
        if torch.is_grad_enabled():  # the input of the gate is kept, not computed again
            hidden = ops.activation(ops.grouped_linear(rows, self.gate_up_proj, ends), kind, gated=True)
        else:
            hidden = ops.grouped_linear(rows, self.gate_up_proj, ends, activation=kind, gated=True)
        out = ops.grouped_linear(hidden, self.down_proj, ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out = out[back].unflatten(0, top_k_index.shape) * top_k_weights[..., None]
        return out.sum(1).to(hidden_states.dtype)


@_instead_of(t5.T5DenseGatedActDense)
class T5GatedMLP(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = _gated(self.act, self.wi_0(hidden_states), self.wi_1(hidden_states))
        return _t5_output(self, hidden)


@_instead_of(t5.T5DenseActDense)
class T5MLP(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _t5_output(self, _activated(self.wi, self.act, hidden_states))


def _t5_output(module, hidden):
    """In the dtype of the weight, which transformers keeps in float32."""
    hidden = module.dropout(hidden)
    dtype = module.wo.weight.dtype
    return module.wo(hidden.to(dtype) if dtype.is_floating_point else hidden)


@_instead_of(BertIntermediate)
class ActivatedDense(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _activated(self.dense, self.intermediate_act_fn, hidden_states)


@_instead_of(GPT2MLP)
class GPT2FeedForward(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.c_proj(_activated(self.c_fc, self.act, hidden_states)))


@_instead_of(BertOutput)
class DenseAddNorm(nn.Module):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return norm_alone_of_sum(self.LayerNorm, self.dropout(self.dense(hidden_states)), input_tensor)


@_instead_of(t5.T5Attention)
class T5Attention(nn.Module):
    """Hands the table of position biases to `attention`, which makes no [H, T, S] of it."""

    def forward(
        self, hidden_states, mask=None, key_value_states=None, position_bias=None, cache=None, **kwargs
    ):
        if position_bias is None and self.config._attn_implementation == NAME:
            if not self.has_relative_attention_bias:
                position_bias = hidden_states.new_empty(0, self.n_heads)
            elif cache is None or not cache.is_compileable:  # else positions are not told by lengths
                position_bias = self.relative_attention_bias.weight
        return super().forward(hidden_states, mask, key_value_states, position_bias, cache, **kwargs)
