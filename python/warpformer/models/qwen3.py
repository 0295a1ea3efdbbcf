"""Qwen3: Yang et al., "Qwen3 Technical Report" (2025): Llama with an RMSNorm of every query and key."""

from dataclasses import dataclass

from warpformer.models import llama, qwen2
from warpformer.models._keys import KeyMap
from warpformer.nn import PreNormLayer, RMSNorm


@dataclass(kw_only=True)
class Config(qwen2.Config):
    head_dim: int | None = 128


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer)


def decoder_layer(config: Config, layer: int, rotary) -> PreNormLayer:
    q_norm, k_norm = (RMSNorm(config.head_dim, eps=config.rms_norm_eps) for _ in range(2))
    attention = llama.attention(config, layer, rotary, q_norm=q_norm, k_norm=k_norm)
    return PreNormLayer(llama.rms_norm(config), attention, llama.rms_norm(config), llama.feed_forward(config))


NORMS = {
    "layers.*.attention.q_norm": "layers.*.self_attn.q_norm",
    "layers.*.attention.k_norm": "layers.*.self_attn.k_norm",
}
HEADS = llama.heads("Qwen3")
KEYS = KeyMap(llama.ATTENTION | NORMS | llama.FEED_FORWARD, llama.HEAD, prefix="model")
