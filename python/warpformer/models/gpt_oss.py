"""gpt-oss: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).

x = x + out(attention(rope(qkv(rms_norm(x)))))      with a sink in every head, every other layer with a window
x = x + sum_j w_j expert_j(rms_norm(x))             w the softmax of the chosen experts' logits
expert(h) = down((clip(up(h)) + 1) g sigmoid(1.702 g)), g = min(gate(h), 7)
"""

from dataclasses import dataclass

import torch
from torch import nn

from warpformer.models import llama
from warpformer.models._config import require
from warpformer.models._keys import KeyMap
from warpformer.models.mixtral import require_experts
from warpformer.nn import ClampedSwiGLU, Experts, MixtureOfExperts, PreNormLayer, Router, TopKSoftmax


@dataclass(kw_only=True)
class Config(llama.Config):
    num_key_value_heads: int | None = 8
    head_dim: int | None = 64
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 150000.0
    attention_bias: bool = True
    sliding_window: int | None = 128
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def __post_init__(self):
        super().__post_init__()
        require_experts(
            num_experts_per_tok=self.num_experts_per_tok, num_local_experts=self.num_local_experts
        )
        require(self.swiglu_alpha != 0, "swiglu_alpha = 0")
        if self.layer_types is None:
            kinds = ("sliding_attention", "full_attention")
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer)


def decoder_layer(config: Config, layer: int, rotary) -> PreNormLayer:
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    sinks = nn.Parameter(torch.zeros(config.num_attention_heads))
    attention = llama.attention(config, layer, rotary, sinks=sinks)
    router = Router(width, experts, TopKSoftmax(config.num_experts_per_tok), bias=True)
    gate = ClampedSwiGLU(config.swiglu_alpha, config.swiglu_limit)
    mixture = MixtureOfExperts(router, Experts(experts, width, inner, gate, bias=True))
    return PreNormLayer(llama.rms_norm(config), attention, llama.rms_norm(config), mixture)


EXPERTS = {
    "layers.*.attention.sinks": "layers.*.self_attn.sinks",
    "layers.*.feed_forward.router": "layers.*.mlp.router",
    "layers.*.feed_forward.experts.gate_up.weight": "layers.*.mlp.experts.gate_up_proj",
    "layers.*.feed_forward.experts.gate_up.bias": "layers.*.mlp.experts.gate_up_proj_bias",
    "layers.*.feed_forward.experts.down.weight": "layers.*.mlp.experts.down_proj",
    "layers.*.feed_forward.experts.down.bias": "layers.*.mlp.experts.down_proj_bias",
}
HEADS = llama.heads("GptOss")
del HEADS["GptOssForQuestionAnswering"]  # transformers has none
KEYS = KeyMap(
    llama.ATTENTION | EXPERTS,
    llama.HEAD,
    prefix="model",
    transposed=[name for name in EXPERTS if name.endswith("weight")],
)
