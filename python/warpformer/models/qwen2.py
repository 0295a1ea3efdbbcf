"""Qwen2: Yang et al., "Qwen2 Technical Report" (2024): Llama with biases of queries, keys and values."""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models.llama import KEYS
from warpformer.nn import PreNormLayer

__all__ = ["HEADS", "KEYS", "Config", "Model"]


@dataclass(kw_only=True)
class Config(llama.Config):
    max_position_embeddings: int = 32768
    sliding_window: int | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def __post_init__(self):
        super().__post_init__()
        if not self.use_sliding_window:
            self.sliding_window = None
        if self.layer_types is None:
            first = self.max_window_layers
            self.layer_types = [
                "full_attention" if i < first else "sliding_attention" for i in range(self.num_hidden_layers)
            ]


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer)


def decoder_layer(config: Config, layer: int, rotary) -> PreNormLayer:
    attention = llama.attention(config, layer, rotary, qkv=llama.qkv_projection(config, bias=True))
    return PreNormLayer(llama.rms_norm(config), attention, llama.rms_norm(config), llama.feed_forward(config))


HEADS = llama.heads("Qwen2")
