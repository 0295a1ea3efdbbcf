"""Phi-3: Abdin et al., "Phi-3 Technical Report" (2024): Llama whose checkpoints hold fused projections, with
the frequencies of LongRoPE (Ding et al., 2024) for long contexts."""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models._keys import KeyMap
from warpformer.nn import FeedForward, FusedLinear, Linear, PreNormLayer


@dataclass(kw_only=True)
class Config(llama.Config):
    max_position_embeddings: int = 4096
    original_max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0

    @property
    def rope(self):
        rope = super().rope
        if rope.get("type", rope.get("rope_type")) == "su":  # its first name
            rope["rope_type"] = "longrope"
        return {"original_max_position_embeddings": self.original_max_position_embeddings} | rope


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer, dropout=config.embd_pdrop)


def decoder_layer(config: Config, layer: int, rotary) -> PreNormLayer:
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    qkv = Linear(width, heads * config.head_dim, bias=False)
    attention = llama.attention(config, layer, rotary, qkv=qkv, dropout=config.resid_pdrop)
    up = FusedLinear(width, {"": 2 * inner}, bias=False, gated=True)
    down = Linear(inner, width, bias=False)
    feed_forward = FeedForward(up, down, config.activation, config.resid_pdrop)
    return PreNormLayer(llama.rms_norm(config), attention, llama.rms_norm(config), feed_forward)


HEADS = llama.heads("Phi3")
del HEADS["Phi3ForQuestionAnswering"]  # transformers has none
KEYS = KeyMap(
    {
        "tokens": "embed_tokens",
        "layers.*.attention_norm": "layers.*.input_layernorm",
        "layers.*.attention.qkv": "layers.*.self_attn.qkv_proj",
        "layers.*.attention.out": "layers.*.self_attn.o_proj",
        "layers.*.feed_forward_norm": "layers.*.post_attention_layernorm",
        "layers.*.feed_forward.up": "layers.*.mlp.gate_up_proj",
        "layers.*.feed_forward.down": "layers.*.mlp.down_proj",
        "norm": "norm",
    },
    llama.HEAD,
    prefix="model",
)
