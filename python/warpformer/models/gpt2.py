"""GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).

    x = tokens[input_ids] + positions[position_ids]
    x = x + out(attention(qkv(layer_norm(x))))
    x = x + down(gelu(up(layer_norm(x))))
    logits = tokens layer_norm(x)

Checkpoints hold the transposed matrices of linear layers.
"""

from dataclasses import dataclass

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
from warpformer.nn import Embedding, FeedForward, LayerNorm, Linear, PreNormLayer, SelfAttention


@dataclass(kw_only=True)
class Config(Labels):
    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_layers(n_layer=self.n_layer)
        require_multiple(n_embd=self.n_embd, n_head=self.n_head)
        require(self.layer_norm_epsilon >= 0, f"layer_norm_epsilon = {self.layer_norm_epsilon} is negative")
        require(not self.add_cross_attention, "add_cross_attention = true: this is the decoder alone")
        self.activation = activation_of("activation_function", self.activation_function)

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that there are positions for."""
        return self.n_positions


class Model(Decoder):
    def __init__(self, config: Config):
        super().__init__(
            config,
            Embedding(config.vocab_size, config.n_embd),
            [decoder_layer(config, i) for i in range(config.n_layer)],
            norm(config),
            positions=Embedding(config.n_positions, config.n_embd),
            dropout=config.embd_pdrop,
        )


def norm(config: Config) -> LayerNorm:
    return LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)


def decoder_layer(config: Config, layer: int) -> PreNormLayer:
    width, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    scale = (width // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= layer + 1
    attention = SelfAttention(
        Linear(width, 3 * width),
        Linear(width, width),
        config.n_head,
        config.n_head,
        dropout=config.resid_pdrop,
        attention_dropout=config.attn_pdrop,
        scale=scale,
    )
    feed_forward = FeedForward(
        Linear(width, inner), Linear(inner, width), config.activation, config.resid_pdrop
    )
    return PreNormLayer(norm(config), attention, norm(config), feed_forward)


MATRICES = {
    "layers.*.attention.qkv": "h.*.attn.c_attn",
    "layers.*.attention.out": "h.*.attn.c_proj",
    "layers.*.feed_forward.up": "h.*.mlp.c_fc",
    "layers.*.feed_forward.down": "h.*.mlp.c_proj",
}
OTHERS = {
    "tokens": "wte",
    "positions": "wpe",
    "layers.*.attention_norm": "h.*.ln_1",
    "layers.*.feed_forward_norm": "h.*.ln_2",
    "norm": "ln_f",
}
HEADS = {
    "GPT2LMHeadModel": CausalLM,
    "GPT2Model": None,
    "GPT2ForSequenceClassification": LastTokenClassifier,
    "GPT2ForTokenClassification": TokenClassifier,
    "GPT2ForQuestionAnswering": DecoderQuestionAnswering,
}
KEYS = KeyMap(
    MATRICES | OTHERS,
    {"lm_head": "lm_head", "score": "score", "classifier": "classifier", "qa": "qa_outputs"},
    prefix="transformer",
    transposed=[f"{name}.weight" for name in MATRICES],
    ignored=("h.*.attn.bias", "h.*.attn.masked_bias"),
)
