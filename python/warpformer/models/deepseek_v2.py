"""DeepSeek-V2: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language
Model" (2024).

    x = x + latent_attention(rms_norm(x))         see nn.LatentAttention: only latents are cached
    x = x + shared(h) + sum_j w_j expert_j(h), h = rms_norm(x)

w are the largest of a softmax, from few groups of experts; the first layers are dense.
"""

import math
from dataclasses import dataclass, field

from torch import Tensor, nn

from warpformer.models import llama
from warpformer.models._config import OR_ZERO, require, require_multiple
from warpformer.models._keys import KeyMap
from warpformer.models.mixtral import require_experts
from warpformer.nn import (
    Experts,
    FeedForward,
    FusedLinear,
    GroupLimitedTopK,
    LatentAttention,
    Linear,
    MixtureOfExperts,
    PreNormLayer,
    RMSNorm,
    RotaryEmbedding,
    Router,
    SoftmaxTopK,
)

TOPK_METHODS = ("greedy", "group_limited_greedy")


@dataclass(kw_only=True)
class Config(llama.Config):
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    moe_intermediate_size: int = 1407
    n_routed_experts: int = 64
    n_shared_experts: int | None = 2
    num_experts_per_tok: int = 6
    n_group: int | None = field(default=None, metadata=OR_ZERO)
    topk_group: int | None = field(default=None, metadata=OR_ZERO)
    topk_method: str = "greedy"
    routed_scaling_factor: float = 1.0
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_experts(num_experts_per_tok=self.num_experts_per_tok, n_routed_experts=self.n_routed_experts)
        require(
            self.topk_method in TOPK_METHODS,
            f"topk_method = {self.topk_method!r:.80} is none of {TOPK_METHODS}",
        )
        require(self.scoring_func == "softmax", f"scoring_func = {self.scoring_func!r:.80} is not 'softmax'")
        require(self.moe_layer_freq == 1, f"moe_layer_freq = {self.moe_layer_freq} is not 1")
        require(self.num_key_value_heads == self.num_attention_heads, "latent attention has no grouped heads")
        if self.topk_method == "group_limited_greedy":
            require(self.n_group and self.topk_group, "group_limited_greedy needs n_group and topk_group")
            require_multiple(n_routed_experts=self.n_routed_experts, n_group=self.n_group)
            require(self.topk_group <= self.n_group, f"topk_group = {self.topk_group} is over n_group")
            most = self.topk_group * (self.n_routed_experts // self.n_group)
            require(
                self.num_experts_per_tok <= most,
                f"num_experts_per_tok = {self.num_experts_per_tok} is over {most}",
            )

    @property
    def scale(self) -> float:
        """Of the scores: YaRN sharpens them where it stretches the context."""
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        factor, mscale = self.rope.get("factor"), self.rope.get("mscale_all_dim")
        numbers = isinstance(factor, int | float) and isinstance(mscale, int | float)
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind == "default" or not numbers or not mscale or factor <= 1:
            return scale
        return scale * (0.1 * mscale * math.log(factor) + 1) ** 2


class LowRank(nn.Module):
    """up(norm(down(x))): queries by way of a latent vector."""

    def __init__(self, down: nn.Module, norm: nn.Module, up: nn.Module):
        super().__init__()
        self.down, self.norm, self.up = down, norm, up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x)))


class Model(llama.Model):
    def __init__(self, config: Config):
        rotary = RotaryEmbedding(
            config.qk_rope_head_dim,
            scaling=config.rope,
            max_position_embeddings=config.max_position_embeddings,
            interleaved=True,
        )
        super().__init__(config, decoder_layer, rotary=rotary)


def decoder_layer(config: Config, layer: int, rotary: RotaryEmbedding) -> PreNormLayer:
    is_dense = layer < config.first_k_dense_replace
    feed_forward = llama.feed_forward(config) if is_dense else mixture(config)
    attention = latent_attention(config, rotary)
    return PreNormLayer(llama.rms_norm(config), attention, llama.rms_norm(config), feed_forward)


def latent_attention(config: Config, rotary: RotaryEmbedding) -> LatentAttention:
    width, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    rank, q_rank = config.kv_lora_rank, config.q_lora_rank
    if q_rank is None:
        q = Linear(width, queries, bias=False)
    else:
        q = LowRank(Linear(width, q_rank, bias=bias), norm(q_rank), Linear(q_rank, queries, bias=False))
    return LatentAttention(
        q,
        Linear(width, rank + config.qk_rope_head_dim, bias=bias),
        norm(rank),
        Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False),
        Linear(heads * config.v_head_dim, width, bias=bias),
        heads,
        config.qk_rope_head_dim,
        config.v_head_dim,
        rotary=rotary,
        scale=config.scale,
        attention_dropout=config.attention_dropout,
    )


def norm(width: int) -> RMSNorm:
    return RMSNorm(width, eps=1e-6)  # whatever rms_norm_eps is, in the published code


def mixture(config: Config) -> MixtureOfExperts:
    width, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    k, options = config.num_experts_per_tok, {"scale": config.routed_scaling_factor}
    if config.topk_method == "greedy":
        selection = SoftmaxTopK(k, normalize=False, **options)
    else:
        selection = GroupLimitedTopK(k, config.n_group, config.topk_group, **options)
    parts = dict(gate_up_parts={"gate": inner, "up": inner}, down_parts={"down": width})
    shared = None
    if config.n_shared_experts is not None:
        count = config.n_shared_experts * inner
        up = FusedLinear(width, {"gate": count, "up": count}, bias=config.mlp_bias, gated=True)
        shared = FeedForward(up, Linear(count, width, bias=config.mlp_bias), config.activation)
    routed = Experts(experts, width, inner, config.activation, **parts)
    return MixtureOfExperts(Router(width, experts, selection), routed, shared)


ATTENTION = {
    "tokens": "embed_tokens",
    "layers.*.attention_norm": "layers.*.input_layernorm",
    "layers.*.attention.q": "layers.*.self_attn.q_proj",
    "layers.*.attention.q.down": "layers.*.self_attn.q_a_proj",
    "layers.*.attention.q.norm": "layers.*.self_attn.q_a_layernorm",
    "layers.*.attention.q.up": "layers.*.self_attn.q_b_proj",
    "layers.*.attention.kv_down": "layers.*.self_attn.kv_a_proj_with_mqa",
    "layers.*.attention.kv_norm": "layers.*.self_attn.kv_a_layernorm",
    "layers.*.attention.kv_up": "layers.*.self_attn.kv_b_proj",
    "layers.*.attention.out": "layers.*.self_attn.o_proj",
    "layers.*.feed_forward_norm": "layers.*.post_attention_layernorm",
    "norm": "norm",
}
EXPERTS = {
    "layers.*.feed_forward.router": "layers.*.mlp.gate",
    "layers.*.feed_forward.experts.gate_up.*.gate": "layers.*.mlp.experts.*.gate_proj",
    "layers.*.feed_forward.experts.gate_up.*.up": "layers.*.mlp.experts.*.up_proj",
    "layers.*.feed_forward.experts.down.*.down": "layers.*.mlp.experts.*.down_proj",
    "layers.*.feed_forward.shared.up.gate": "layers.*.mlp.shared_experts.gate_proj",
    "layers.*.feed_forward.shared.up.up": "layers.*.mlp.shared_experts.up_proj",
    "layers.*.feed_forward.shared.down": "layers.*.mlp.shared_experts.down_proj",
}
HEADS = llama.heads("DeepseekV2")
KEYS = KeyMap(ATTENTION | llama.FEED_FORWARD | EXPERTS, llama.HEAD, prefix="model", ignored=llama.IGNORED)
