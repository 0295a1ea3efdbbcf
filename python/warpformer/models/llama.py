"""Llama: Touvron et al., "LLaMA" and "Llama 2" (2023); Dubey et al., "The Llama 3 Herd of Models" (2024).

    x = tokens[input_ids]
    x = x + out(attention(rope(qkv(rms_norm(x)))))        for each layer, with grouped keys and values
    x = x + down(silu(gate(h)) up(h)), h = rms_norm(x)
    logits = lm_head(rms_norm(x))

Mistral, Mixtral, Qwen, Phi-3, Gemma-2 and others are made of the same functions.
"""

from dataclasses import dataclass

from torch import nn

from warpformer.models._config import (
    Labels,
    activation_of,
    require,
    require_layers,
    require_multiple,
)
from warpformer.models._decoder import CausalLM, Decoder
from warpformer.models._heads import DecoderQuestionAnswering, LastTokenClassifier, TokenClassifier
from warpformer.models._keys import KeyMap
from warpformer.nn import (
    Embedding,
    FeedForward,
    FusedLinear,
    Linear,
    PreNormLayer,
    RMSNorm,
    RotaryEmbedding,
    SelfAttention,
)

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(kw_only=True)
class Config(Labels):
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    partial_rotary_factor: float = 1.0
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: list | None = None

    def __post_init__(self):
        super().__post_init__()
        require_layers(num_hidden_layers=self.num_hidden_layers)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        require_multiple(
            num_attention_heads=self.num_attention_heads, num_key_value_heads=self.num_key_value_heads
        )
        if self.head_dim is None:
            require_multiple(hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads)
            self.head_dim = self.hidden_size // self.num_attention_heads
        require(self.rms_norm_eps >= 0, f"rms_norm_eps = {self.rms_norm_eps} is negative")
        self.activation = activation_of("hidden_act", self.hidden_act)
        types = self.layer_types
        require(
            types is None
            or (len(types) == self.num_hidden_layers and all(kind in LAYER_TYPES for kind in types)),
            f"layer_types are not one of {LAYER_TYPES} for each layer",
        )

    def window(self, layer: int) -> tuple[int | None, int | None]:
        """(left, right) of the keys that a query of this layer sees; the config counts its own among them."""
        kind = self.layer_types[layer] if self.layer_types else "sliding_attention"
        sliding = self.sliding_window is not None and kind == "sliding_attention"
        return (self.sliding_window - 1, None) if sliding else (None, None)

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that the model was made for."""
        return self.max_position_embeddings

    @property
    def rope(self) -> dict:
        """rope_parameters, or the fields that they were before transformers 5."""
        return {"rope_theta": self.rope_theta} | (self.rope_scaling or {}) | (self.rope_parameters or {})


class Model(Decoder):
    """A relative gives what is its own: the functions that make its layers and its last norm, its rotary."""

    def __init__(self, config: Config, layer=None, norm=None, rotary=None, **options):
        rotary = rotary or rotary_embedding(config)
        layers = [(layer or decoder_layer)(config, i, rotary) for i in range(config.num_hidden_layers)]
        tokens = Embedding(config.vocab_size, config.hidden_size)
        super().__init__(config, tokens, layers, (norm or rms_norm)(config), rotary=rotary, **options)


def decoder_layer(config: Config, layer: int, rotary: RotaryEmbedding) -> PreNormLayer:
    return PreNormLayer(
        rms_norm(config), attention(config, layer, rotary), rms_norm(config), feed_forward(config)
    )


def rms_norm(config: Config) -> RMSNorm:
    return RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def rotary_embedding(config: Config) -> RotaryEmbedding:
    return RotaryEmbedding(
        config.head_dim,
        scaling=config.rope,
        partial_rotary_factor=config.partial_rotary_factor,
        max_position_embeddings=config.max_position_embeddings,
    )


def attention(
    config: Config, layer: int, rotary: RotaryEmbedding, qkv: nn.Module | None = None, **options
) -> SelfAttention:
    return SelfAttention(
        qkv or qkv_projection(config, config.attention_bias),
        Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_bias),
        config.num_attention_heads,
        config.num_key_value_heads,
        rotary=rotary,
        attention_dropout=config.attention_dropout,
        window=config.window(layer),
        **options,
    )


def qkv_projection(config: Config, bias: bool) -> FusedLinear:
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return FusedLinear(config.hidden_size, {"q": queries, "k": keys, "v": keys}, bias=bias)


def feed_forward(config: Config) -> FeedForward:
    width, inner = config.hidden_size, config.intermediate_size
    up = FusedLinear(width, {"gate": inner, "up": inner}, bias=config.mlp_bias, gated=True)
    return FeedForward(up, Linear(inner, width, bias=config.mlp_bias), config.activation)


def heads(architecture: str) -> dict[str, type[nn.Module] | None]:
    """Names of config.json's `architectures` -> what stands on Model; the first is meant if none is named."""
    return {
        f"{architecture}ForCausalLM": CausalLM,
        f"{architecture}Model": None,
        f"{architecture}ForSequenceClassification": LastTokenClassifier,
        f"{architecture}ForTokenClassification": TokenClassifier,
        f"{architecture}ForQuestionAnswering": DecoderQuestionAnswering,
    }


ATTENTION = {
    "tokens": "embed_tokens",
    "layers.*.attention_norm": "layers.*.input_layernorm",
    "layers.*.attention.qkv.q": "layers.*.self_attn.q_proj",
    "layers.*.attention.qkv.k": "layers.*.self_attn.k_proj",
    "layers.*.attention.qkv.v": "layers.*.self_attn.v_proj",
    "layers.*.attention.out": "layers.*.self_attn.o_proj",
    "layers.*.feed_forward_norm": "layers.*.post_attention_layernorm",
    "norm": "norm",
}
FEED_FORWARD = {
    "layers.*.feed_forward.up.gate": "layers.*.mlp.gate_proj",
    "layers.*.feed_forward.up.up": "layers.*.mlp.up_proj",
    "layers.*.feed_forward.down": "layers.*.mlp.down_proj",
}
HEAD = {"lm_head": "lm_head", "score": "score", "classifier": "score", "qa": "qa_outputs"}
IGNORED = ("layers.*.self_attn.rotary_emb.inv_freq",)

HEADS = heads("Llama")
KEYS = KeyMap(ATTENTION | FEED_FORWARD, HEAD, prefix="model", ignored=IGNORED)
