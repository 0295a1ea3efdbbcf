"""Nemotron: Parmar et al., "Nemotron-4 15B Technical Report" (2024).

x = x + out(attention(rope(qkv(norm(x)))))      half of a head rotates
x = x + down(relu(up(norm(x)))^2)               layer norms multiply by 1 + weight
"""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models._keys import KeyMap
from warpformer.nn import FeedForward, Linear, OffsetLayerNorm, PreNormLayer


@dataclass(kw_only=True)
class Config(llama.Config):
    hidden_act: str = "relu2"
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.5


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer, norm)


def decoder_layer(config: Config, layer: int, rotary) -> PreNormLayer:
    width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
    feed_forward = FeedForward(
        Linear(width, inner, bias=bias), Linear(inner, width, bias=bias), config.activation
    )
    return PreNormLayer(norm(config), llama.attention(config, layer, rotary), norm(config), feed_forward)


def norm(config: Config) -> OffsetLayerNorm:
    return OffsetLayerNorm(config.hidden_size, eps=config.norm_eps)


FEED_FORWARD = {
    "layers.*.feed_forward.up": "layers.*.mlp.up_proj",
    "layers.*.feed_forward.down": "layers.*.mlp.down_proj",
}
HEADS = llama.heads("Nemotron")
KEYS = KeyMap(llama.ATTENTION | FEED_FORWARD, llama.HEAD, prefix="model", ignored=llama.IGNORED)
