"""Grok-1: xai-org, "grok-1" (2024), as published: 64 layers of 8 experts, 314 billion parameters.

    x = 78.3837 tokens[input_ids]
    x = x + norm(out(attention(rope(qkv(norm(x))))))      logits 30 tanh(0.0883883 q k / 30)
    x = x + norm(sum_j w_j expert_j(norm(x)))             w the 2 largest of the softmax over 8 experts
    expert(h) = linear_1(gelu(linear(h)) linear_v(h))
    logits = 0.57735 tokens norm(x)

Fields and tensors have the names that the model's checkpoints in the format of transformers have.
"""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models._config import require
from warpformer.models._decoder import CausalLM
from warpformer.models._keys import KeyMap
from warpformer.models.mixtral import require_experts
from warpformer.nn import Experts, MixtureOfExperts, Router, SandwichNormLayer, SoftmaxTopK


@dataclass(kw_only=True)
class Config(llama.Config):
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    num_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self):
        super().__post_init__()
        require_experts(num_experts_per_tok=self.num_experts_per_tok, num_experts=self.num_experts)
        require(self.max_attn_value > 0, f"max_attn_value = {self.max_attn_value} is not positive")
        self.activation = "gelu_tanh"  # the published code has no name for it


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer, embedding_scale=config.embedding_multiplier_scale)


def decoder_layer(config: Config, layer: int, rotary) -> SandwichNormLayer:
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    attention = llama.attention(
        config, layer, rotary, scale=config.attn_output_multiplier, softcap=config.max_attn_value
    )
    router = Router(width, experts, SoftmaxTopK(config.num_experts_per_tok, normalize=False))
    parts = dict(gate_up_parts={"gate": inner, "up": inner}, down_parts={"down": width})
    mixture = MixtureOfExperts(router, Experts(experts, width, inner, config.activation, **parts))
    norms = [llama.rms_norm(config) for _ in range(4)]
    return SandwichNormLayer(norms[0], attention, norms[1], norms[2], mixture, norms[3])


class ScaledLM(CausalLM):
    def __init__(self, backbone: Model, config: Config):
        super().__init__(backbone, config, logit_scale=config.output_multiplier_scale)


HEADS = {
    "Grok1ForCausalLM": ScaledLM,
    "Grok1ModelForCausalLM": ScaledLM,
    "Grok1Model": None,
}
KEYS = KeyMap(
    {
        "tokens": "embed_tokens",
        "layers.*.attention_norm.weight": "layers.*.pre_attn_norm.scale",
        "layers.*.attention.qkv.q": "layers.*.attn.q_proj",
        "layers.*.attention.qkv.k": "layers.*.attn.k_proj",
        "layers.*.attention.qkv.v": "layers.*.attn.v_proj",
        "layers.*.attention.out": "layers.*.attn.o_proj",
        "layers.*.attention_post_norm.weight": "layers.*.post_attn_norm.scale",
        "layers.*.feed_forward_norm.weight": "layers.*.pre_moe_norm.scale",
        "layers.*.feed_forward.router": "layers.*.moe_block.gate",
        "layers.*.feed_forward.experts.gate_up.*.gate": "layers.*.moe_block.experts.*.linear",
        "layers.*.feed_forward.experts.gate_up.*.up": "layers.*.moe_block.experts.*.linear_v",
        "layers.*.feed_forward.experts.down.*.down": "layers.*.moe_block.experts.*.linear_1",
        "layers.*.feed_forward_post_norm.weight": "layers.*.post_moe_norm.scale",
        "norm.weight": "norm.scale",
    },
    {"lm_head": "lm_head"},
    prefix="model",
    ignored=("layers.*.attn.rotary_emb.inv_freq",),
)
