"""T5: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(2020); version 1.1: Shazeer, "GLU Variants Improve Transformer" (2020), and FLAN-T5.

    x = tokens[input_ids]                                              of the encoder, and of the decoder
    x = x + out(attention(qkv(rms_norm(x))))                           for each layer: softmax(q k + bias) v
    x = x + out(attention(q(rms_norm(x)), kv(memory)))                 in the decoder
    x = x + down(relu(up(h))), h = rms_norm(x)                         1.1: down(gelu(gate(h)) up(h))
    logits = tokens rms_norm(x) / sqrt(d_model)                        1.1: lm_head rms_norm(x)

bias: by the distance of two tokens, one table for all layers of the encoder and one for those of the decoder.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from warpformer.models._config import OR_ZERO, Labels, activation_of, require, require_layers
from warpformer.models._heads import Head
from warpformer.models._init import init_
from warpformer.models._keys import KeyMap
from warpformer.models._seq2seq import DecoderStack, EncoderStack, Seq2Seq
from warpformer.models._seq2seq_heads import LastEosClassifier, Seq2SeqLM, ShiftedQuestionAnswering
from warpformer.nn import (
    CrossAttention,
    Dropout,
    Embedding,
    FeedForward,
    FusedLinear,
    Linear,
    PreNormCrossLayer,
    PreNormLayer,
    RMSNorm,
    SelfAttention,
    Sequences,
)


@dataclass(kw_only=True)
class Config(Labels):
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    classifier_dropout: float = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    decoder_start_token_id: int | None = field(default=0, metadata=OR_ZERO)
    eos_token_id: int | list | None = field(default=1, metadata=OR_ZERO)
    pad_token_id: int | None = field(default=0, metadata=OR_ZERO)

    def __post_init__(self):
        super().__post_init__()
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        require_layers(num_layers=self.num_layers, num_decoder_layers=self.num_decoder_layers)
        require(self.layer_norm_epsilon >= 0, f"layer_norm_epsilon = {self.layer_norm_epsilon} is negative")
        require(self.initializer_factor >= 0, f"initializer_factor = {self.initializer_factor} is negative")
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        require(
            buckets >= 4 and distance > buckets // 2,
            f"relative_attention_num_buckets = {buckets} is below 4, or relative_attention_max_distance = "
            f"{distance} not above the half of it",
        )
        *gated, name = self.feed_forward_proj.split("-")
        require(
            gated in ([], ["gated"]),
            f"feed_forward_proj = {self.feed_forward_proj!r:.80} is not [gated-]<name>",
        )
        self.is_gated = bool(gated)
        self.activation = activation_of("feed_forward_proj", "gelu_new" if gated and name == "gelu" else name)
        if self.scale_decoder_outputs is None:  # of version 1.1 only tie_word_embeddings tells
            self.scale_decoder_outputs = self.tie_word_embeddings

    @property
    def hidden_size(self) -> int:
        return self.d_model

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.d_kv


class Model(Seq2Seq):
    def __init__(self, config: Config):
        tokens = Embedding(config.vocab_size, config.d_model)
        super().__init__(config, encoder(config), decoder(config), tokens)
        init_as_t5_(self)


@torch.no_grad()
def init_as_t5_(model: Model) -> None:
    """Products have the variance of what they are of; those of queries and keys too, which are not scaled."""
    factor, width = model.config.initializer_factor, model.config.d_model
    init_(model.tokens, factor)
    for module in model.modules():
        if isinstance(module, Linear):
            init_(module, factor * module.in_features**-0.5)
    for stack in (model.encoder, model.decoder):
        init_(stack.layers[0].attention.position_bias, factor * width**-0.5)
        for layer in stack.layers:
            layer.attention.qkv.weight[: model.config.inner] *= model.config.d_kv**-0.5
    for layer in model.decoder.layers:
        layer.cross_attention.q.weight *= model.config.d_kv**-0.5


def encoder(config: Config) -> EncoderStack:
    bias = position_bias(config)

    def make():
        attention = self_attention(config, bias, is_causal=False)
        return PreNormLayer(rms_norm(config), attention, rms_norm(config), feed_forward(config))

    return EncoderStack([make() for _ in range(config.num_layers)], **end(config))


def decoder(config: Config) -> DecoderStack:
    bias = position_bias(config)

    def make():
        return PreNormCrossLayer(
            *(rms_norm(config), self_attention(config, bias, is_causal=True)),
            *(rms_norm(config), cross_attention(config)),
            *(rms_norm(config), feed_forward(config)),
        )

    return DecoderStack([make() for _ in range(config.num_decoder_layers)], **end(config))


def end(config: Config) -> dict:
    dropout = config.dropout_rate
    return dict(norm=rms_norm(config), dropout=dropout, norm_dropout=dropout)


def rms_norm(config: Config) -> RMSNorm:
    return RMSNorm(config.d_model, eps=config.layer_norm_epsilon)


def position_bias(config: Config) -> Embedding:
    return Embedding(config.relative_attention_num_buckets, config.num_heads)


def self_attention(config: Config, position_bias: Embedding, is_causal: bool) -> SelfAttention:
    width, inner, heads = config.d_model, config.inner, config.num_heads
    return SelfAttention(
        FusedLinear(width, {"q": inner, "k": inner, "v": inner}, bias=False),
        Linear(inner, width, bias=False),
        *(heads, heads),
        is_causal=is_causal,
        position_bias=position_bias,
        position_bidirectional=not is_causal,
        position_max_distance=config.relative_attention_max_distance,
        **unscaled(config),
    )


def cross_attention(config: Config) -> CrossAttention:
    width, inner, heads = config.d_model, config.inner, config.num_heads
    return CrossAttention(
        Linear(width, inner, bias=False),
        FusedLinear(width, {"k": inner, "v": inner}, bias=False),
        Linear(inner, width, bias=False),
        *(heads, heads),
        **unscaled(config),
    )


def unscaled(config: Config) -> dict:
    return dict(scale=1.0, dropout=config.dropout_rate, attention_dropout=config.dropout_rate)


def feed_forward(config: Config) -> FeedForward:
    width, inner = config.d_model, config.d_ff
    if config.is_gated:
        up = FusedLinear(width, {"gate": inner, "up": inner}, bias=False, gated=True)
    else:
        up = Linear(width, inner, bias=False)
    down = Linear(inner, width, bias=False)
    return FeedForward(up, down, config.activation, config.dropout_rate, config.dropout_rate)


class ConditionalGeneration(Seq2SeqLM):
    """Logits of the next token of the decoder.

    Version 1.1 has an lm_head of its own; checkpoints of it without one share the table of tokens.
    """

    def __init__(self, backbone: Model, config: Config):
        tied = config.scale_decoder_outputs
        super().__init__(backbone, config, tied=tied)
        if not tied:
            init_(self.lm_head, config.initializer_factor * config.d_model**-0.5)
            self.tied_if_missing = {"lm_head": self.table}

    def logits(self, rows: Tensor) -> Tensor:
        scaled = rows * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else rows
        return super().logits(scaled)


class EncoderModel(Head):
    """Hidden states [B, S, C] of the encoder, 0 at padding; there is no decoder."""

    prefix = ""

    def __init__(self, backbone: Model, config: Config):
        super().__init__(backbone, config)
        backbone.decoder = None

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of `encode` of the backbone."""
        rows, sequences = self.backbone.encode(*args, **kwargs)
        return sequences.pad(rows)

    def forward_packed(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Hidden states [N, C] of ids [N] or embeddings [N, C] of packed sequences."""
        return self.backbone.encode_packed(tokens, sequences)


class EncoderTokenClassifier(EncoderModel):
    """Logits [B, S, num_labels] of every token of the encoder, 0 at padding: classifier(dropout(hidden))."""

    prefix = "transformer"

    def __init__(self, backbone: Model, config: Config):
        super().__init__(backbone, config)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = Linear(config.d_model, config.num_labels)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of `encode` of the backbone."""
        rows, sequences = self.backbone.encode(*args, **kwargs)
        return sequences.pad(self.classifier(self.dropout(rows)))


class SequenceClassifier(LastEosClassifier):
    prefix = "transformer"


def stack_keys(stack: str, feed_forward: int) -> dict[str, str]:
    """Of the encoder or the decoder; `feed_forward` is the number of that block in a layer."""
    layer, block = f"{stack}.layers.*", f"{stack}.block.*.layer"
    dense = f"{block}.{feed_forward}.DenseReluDense"
    return {
        f"{layer}.attention.position_bias": f"{block}.0.SelfAttention.relative_attention_bias",
        f"{layer}.attention.qkv.q": f"{block}.0.SelfAttention.q",
        f"{layer}.attention.qkv.k": f"{block}.0.SelfAttention.k",
        f"{layer}.attention.qkv.v": f"{block}.0.SelfAttention.v",
        f"{layer}.attention.out": f"{block}.0.SelfAttention.o",
        f"{layer}.attention_norm": f"{block}.0.layer_norm",
        f"{layer}.feed_forward.up": f"{dense}.wi",
        f"{layer}.feed_forward.up.gate": f"{dense}.wi_0",
        f"{layer}.feed_forward.up.up": f"{dense}.wi_1",
        f"{layer}.feed_forward.down": f"{dense}.wo",
        f"{layer}.feed_forward_norm": f"{block}.{feed_forward}.layer_norm",
        f"{stack}.norm": f"{stack}.final_layer_norm",
    }


BACKBONE = {
    **stack_keys("encoder", 1),
    **stack_keys("decoder", 2),
    "decoder.layers.*.cross_attention.q": "decoder.block.*.layer.1.EncDecAttention.q",
    "decoder.layers.*.cross_attention.kv.k": "decoder.block.*.layer.1.EncDecAttention.k",
    "decoder.layers.*.cross_attention.kv.v": "decoder.block.*.layer.1.EncDecAttention.v",
    "decoder.layers.*.cross_attention.out": "decoder.block.*.layer.1.EncDecAttention.o",
    "decoder.layers.*.cross_attention_norm": "decoder.block.*.layer.1.layer_norm",
    "tokens": ("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
}
HEAD = {
    "lm_head": "lm_head",
    "dense": "classification_head.dense",
    "out": "classification_head.out_proj",
    "classifier": "classifier",
    "qa": "qa_outputs",
}
IGNORED = ("decoder.block.*.layer.*.EncDecAttention.relative_attention_bias.weight",)  # of the first ones


def heads(architecture: str) -> dict[str, type[nn.Module] | None]:
    return {
        f"{architecture}ForConditionalGeneration": ConditionalGeneration,
        f"{architecture}Model": None,
        f"{architecture}EncoderModel": EncoderModel,
        f"{architecture}ForSequenceClassification": SequenceClassifier,
        f"{architecture}ForTokenClassification": EncoderTokenClassifier,
        f"{architecture}ForQuestionAnswering": ShiftedQuestionAnswering,
    }


HEADS = heads("T5")
KEYS = KeyMap(BACKBONE, HEAD, ignored=IGNORED)
