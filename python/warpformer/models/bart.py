"""BART: Lewis et al., "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation,
Translation, and Comprehension" (2019).

    x = layer_norm(tokens[input_ids] + positions[position + 2])        of the encoder, and of the decoder
    x = layer_norm(x + out(attention(qkv(x))))                         for each layer
    x = layer_norm(x + out(attention(q(x), kv(memory))))               in the decoder
    x = layer_norm(x + fc2(gelu(fc1(x))))
    logits = tokens x + final_logits_bias

Marian, mBART and the original Transformer are made of the same functions.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from warpformer.models._config import (
    OR_ZERO,
    Labels,
    activation_of,
    require,
    require_layers,
    require_multiple,
)
from warpformer.models._init import init_
from warpformer.models._keys import KeyMap
from warpformer.models._seq2seq import DecoderStack, EncoderStack, Seq2Seq
from warpformer.models._seq2seq_heads import LastEosClassifier, Seq2SeqLM, ShiftedQuestionAnswering
from warpformer.nn import (
    CrossAttention,
    Embedding,
    FeedForward,
    FusedLinear,
    LayerNorm,
    Linear,
    PostNormCrossLayer,
    PostNormLayer,
    SelfAttention,
    Sequences,
)

OFFSET = 2  # rows of the table of positions before that of the first token


@dataclass(kw_only=True)
class Config(Labels):
    vocab_size: int = 50265
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    activation_function: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    classifier_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = False
    tie_word_embeddings: bool = True
    decoder_start_token_id: int | None = field(default=2, metadata=OR_ZERO)
    eos_token_id: int | list | None = field(default=2, metadata=OR_ZERO)
    pad_token_id: int | None = field(default=1, metadata=OR_ZERO)

    unnamed_labels = 3  # how many there are where none has a name

    def __post_init__(self):
        if self.num_labels is None and not self.id2label:
            self.num_labels = self.unnamed_labels
        super().__post_init__()
        require_layers(encoder_layers=self.encoder_layers, decoder_layers=self.decoder_layers)
        require_multiple(d_model=self.d_model, encoder_attention_heads=self.encoder_attention_heads)
        require_multiple(d_model=self.d_model, decoder_attention_heads=self.decoder_attention_heads)
        require(self.init_std >= 0, f"init_std = {self.init_std} is negative")
        self.activation = activation_of("activation_function", self.activation_function)

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that there are positions for."""
        return self.max_position_embeddings

    @property
    def layer_norm_eps(self) -> float:
        return 1e-5

    @property
    def embedding_scale(self) -> float:
        return self.d_model**0.5 if self.scale_embedding else 1.0


class Model(Seq2Seq):
    """A relative gives the classes of its layers and whether the stacks end with a norm."""

    def __init__(
        self, config: Config, layer=PostNormLayer, cross_layer=PostNormCrossLayer, *, has_norm=False
    ):
        def beginning_and_end():
            return dict(
                positions=LearnedPositions(config.max_position_embeddings + OFFSET, config.d_model),
                embedding_norm=norm(config),
                norm=norm(config) if has_norm else None,
            )

        super().__init__(
            config,
            encoder(config, layer, **beginning_and_end()),
            decoder(config, cross_layer, **beginning_and_end()),
            Embedding(config.vocab_size, config.d_model),
            config.embedding_scale,
        )
        init_(self, config.init_std)


class LearnedPositions(Embedding):
    """[N, C] of Sequences."""

    def forward(self, sequences: Sequences) -> Tensor:
        return super().forward(sequences.positions + OFFSET)


def norm(config: Config) -> LayerNorm:
    return LayerNorm(config.d_model, eps=config.layer_norm_eps)


def encoder(config: Config, layer=PostNormLayer, **options) -> EncoderStack:
    """The options are those of EncoderStack."""
    heads, inner = config.encoder_attention_heads, config.encoder_ffn_dim

    def make():
        attention = self_attention(config, heads, is_causal=False)
        return layer(norm(config), attention, norm(config), feed_forward(config, inner))

    return EncoderStack([make() for _ in range(config.encoder_layers)], dropout=config.dropout, **options)


def decoder(config: Config, layer=PostNormCrossLayer, **options) -> DecoderStack:
    heads, inner = config.decoder_attention_heads, config.decoder_ffn_dim

    def make():
        return layer(
            *(norm(config), self_attention(config, heads, is_causal=True)),
            *(norm(config), cross_attention(config, heads)),
            *(norm(config), feed_forward(config, inner)),
        )

    return DecoderStack([make() for _ in range(config.decoder_layers)], dropout=config.dropout, **options)


def self_attention(config: Config, heads: int, is_causal: bool) -> SelfAttention:
    width = config.d_model
    return SelfAttention(
        FusedLinear(width, {"q": width, "k": width, "v": width}),
        Linear(width, width),
        *(heads, heads),
        is_causal=is_causal,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
    )


def cross_attention(config: Config, heads: int) -> CrossAttention:
    width = config.d_model
    return CrossAttention(
        Linear(width, width),
        FusedLinear(width, {"k": width, "v": width}),
        Linear(width, width),
        *(heads, heads),
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
    )


def feed_forward(config: Config, inner: int) -> FeedForward:
    up, down = Linear(config.d_model, inner), Linear(inner, config.d_model)
    return FeedForward(up, down, config.activation, config.dropout, config.activation_dropout)


class ConditionalGeneration(Seq2SeqLM):
    """Logits of the next token of the decoder: lm_head(backbone(...)) + final_logits_bias [1, V]."""

    optional = ("final_logits_bias",)

    def __init__(self, backbone: Seq2Seq, config: Config):
        super().__init__(backbone, config, tied=config.tie_word_embeddings)
        if not config.tie_word_embeddings:
            init_(self.lm_head, config.init_std)
        bias = torch.zeros(1, self.lm_head.out_features)
        self.final_logits_bias = nn.Parameter(bias, requires_grad=False)  # what is trained has it as it is

    def logits(self, rows: Tensor) -> Tensor:
        if self.final_logits_bias is None:
            return super().logits(rows)
        bias = self.final_logits_bias.expand(*rows.shape[:-1], -1)
        return self.lm_head(rows, residual=bias)


def stack_keys(stack: str) -> dict[str, str]:
    """Of the encoder or the decoder."""
    layer = f"{stack}.layers.*"
    return {
        f"{stack}.tokens": f"{stack}.embed_tokens",
        f"{stack}.positions": f"{stack}.embed_positions",
        f"{stack}.embedding_norm": f"{stack}.layernorm_embedding",
        f"{stack}.norm": f"{stack}.layer_norm",
        f"{layer}.attention.qkv.q": f"{layer}.self_attn.q_proj",
        f"{layer}.attention.qkv.k": f"{layer}.self_attn.k_proj",
        f"{layer}.attention.qkv.v": f"{layer}.self_attn.v_proj",
        f"{layer}.attention.out": f"{layer}.self_attn.out_proj",
        f"{layer}.attention_norm": f"{layer}.self_attn_layer_norm",
        f"{layer}.cross_attention.q": f"{layer}.encoder_attn.q_proj",
        f"{layer}.cross_attention.kv.k": f"{layer}.encoder_attn.k_proj",
        f"{layer}.cross_attention.kv.v": f"{layer}.encoder_attn.v_proj",
        f"{layer}.cross_attention.out": f"{layer}.encoder_attn.out_proj",
        f"{layer}.cross_attention_norm": f"{layer}.encoder_attn_layer_norm",
        f"{layer}.feed_forward.up": f"{layer}.fc1",
        f"{layer}.feed_forward.down": f"{layer}.fc2",
        f"{layer}.feed_forward_norm": f"{layer}.final_layer_norm",
    }


BACKBONE = {
    **stack_keys("encoder"),
    **stack_keys("decoder"),
    "tokens": ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
}
HEAD = {
    "lm_head": "lm_head",
    "final_logits_bias": "final_logits_bias",
    "dense": "classification_head.dense",
    "out": "classification_head.out_proj",
    "qa": "qa_outputs",
}
IGNORED = ("encoder.version", "decoder.version")

HEADS = {
    "BartForConditionalGeneration": ConditionalGeneration,
    "BartModel": None,
    "BartForSequenceClassification": LastEosClassifier,
    "BartForQuestionAnswering": ShiftedQuestionAnswering,
}
KEYS = KeyMap(BACKBONE, HEAD, prefix="model", ignored=IGNORED)
