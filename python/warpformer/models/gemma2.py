"""Gemma 2: Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size" (2024).

x = sqrt(C) tokens[input_ids]
x = x + norm(out(attention(rope(qkv(norm(x))))))      attention logits through a softcap, every other layer
x = x + norm(down(gelu(gate(h)) up(h))), h = norm(x)      with a window; norms multiply by 1 + weight
logits = softcap(lm_head(norm(x)))
"""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models._config import activation_of, require
from warpformer.models._decoder import CausalLM
from warpformer.models._keys import KeyMap
from warpformer.nn import OffsetRMSNorm, SandwichNormLayer


@dataclass(kw_only=True)
class Config(llama.Config):
    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    query_pre_attn_scalar: float = 256.0
    sliding_window: int | None = 4096
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: bool | None = None

    def __post_init__(self):
        super().__post_init__()
        self.activation = activation_of("hidden_activation", self.hidden_activation)
        if self.layer_types is None:
            kinds = ("sliding_attention", "full_attention")
            self.layer_types = [kinds[i % 2] for i in range(self.num_hidden_layers)]
        require(self.query_pre_attn_scalar > 0, f"query_pre_attn_scalar = {self.query_pre_attn_scalar}")
        for name in ("final_logit_softcapping", "attn_logit_softcapping"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} = {value} is not positive")
        require(not self.use_bidirectional_attention, "use_bidirectional_attention = true")


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer, norm, embedding_scale=config.hidden_size**0.5)


def decoder_layer(config: Config, layer: int, rotary) -> SandwichNormLayer:
    attention = llama.attention(
        config,
        layer,
        rotary,
        scale=config.query_pre_attn_scalar**-0.5,
        softcap=config.attn_logit_softcapping or 0.0,
    )
    return SandwichNormLayer(
        *(norm(config), attention, norm(config)), *(norm(config), llama.feed_forward(config), norm(config))
    )


def norm(config: Config) -> OffsetRMSNorm:
    return OffsetRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SoftcappedLM(CausalLM):
    def __init__(self, backbone: Model, config: Config):
        super().__init__(backbone, config, softcap=config.final_logit_softcapping or 0.0)


NORMS = {
    "layers.*.attention_post_norm": "layers.*.post_attention_layernorm",
    "layers.*.feed_forward_norm": "layers.*.pre_feedforward_layernorm",
    "layers.*.feed_forward_post_norm": "layers.*.post_feedforward_layernorm",
}
HEADS = llama.heads("Gemma2") | {"Gemma2ForCausalLM": SoftcappedLM}
del HEADS["Gemma2ForQuestionAnswering"]  # transformers has none
KEYS = KeyMap(llama.ATTENTION | NORMS | llama.FEED_FORWARD, llama.HEAD, prefix="model")
