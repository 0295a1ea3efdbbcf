"""BERT: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (2019).

x = layer_norm(tokens[input_ids] + positions[position_ids] + token_types[token_type_ids])
x = layer_norm(x + out(attention(qkv(x))))        for each layer, every token seeing every other
x = layer_norm(x + down(gelu(up(x))))
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from warpformer.models._config import Labels, activation_of, require, require_layers, require_multiple
from warpformer.models._encoder import Encoder, MaskedLM, PooledClassifier
from warpformer.models._heads import Head, QuestionAnswering, TokenClassifier
from warpformer.models._keys import KeyMap
from warpformer.nn import (
    Embedding,
    FeedForward,
    FusedLinear,
    LayerNorm,
    Linear,
    PostNormLayer,
    SelfAttention,
)


@dataclass(kw_only=True)
class Config(Labels):
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_layers(num_hidden_layers=self.num_hidden_layers)
        require_multiple(hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads)
        self.activation = activation_of("hidden_act", self.hidden_act)
        require(self.layer_norm_eps >= 0, f"layer_norm_eps = {self.layer_norm_eps} is negative")
        require(
            self.position_embedding_type == "absolute",
            f"position_embedding_type = {self.position_embedding_type!r} is not 'absolute'",
        )
        require(not self.is_decoder, "is_decoder = true: this is the encoder")
        if self.classifier_dropout is None:
            self.classifier_dropout = self.hidden_dropout_prob

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that there are positions for."""
        return self.max_position_embeddings


class Model(Encoder):
    def __init__(self, config: Config):
        width = config.hidden_size
        super().__init__(
            config,
            Embedding(config.vocab_size, width),
            Embedding(config.max_position_embeddings, width),
            Embedding(config.type_vocab_size, width),
            norm(config),
            [encoder_layer(config) for _ in range(config.num_hidden_layers)],
            Linear(width, width),
            dropout=config.hidden_dropout_prob,
        )


def norm(config: Config) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


def encoder_layer(config: Config) -> PostNormLayer:
    width, inner, dropout = config.hidden_size, config.intermediate_size, config.hidden_dropout_prob
    attention = SelfAttention(
        FusedLinear(width, {"query": width, "key": width, "value": width}),
        Linear(width, width),
        config.num_attention_heads,
        config.num_attention_heads,
        is_causal=False,
        dropout=dropout,
        attention_dropout=config.attention_probs_dropout_prob,
    )
    feed_forward = FeedForward(Linear(width, inner), Linear(inner, width), config.activation, dropout)
    return PostNormLayer(norm(config), attention, norm(config), feed_forward)


class NextSentence(Head):
    """Logits [B, 2] of each pair of sentences: that the second follows the first, and that it does not."""

    needed = ("pooler",)

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.next_sentence = Linear(config.hidden_size, 2)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of Model."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        return self.next_sentence(self.backbone.pool(rows, sequences))


class PreTrainingOutput(NamedTuple):
    prediction_logits: Tensor  # [B, T, V] of the token at every place, 0 at padding
    seq_relationship_logits: Tensor  # [B, 2], as NextSentence has them


class PreTraining(MaskedLM):
    """Both objectives of the paper: MaskedLM and NextSentence."""

    needed = ("pooler",)

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.next_sentence = Linear(config.hidden_size, 2)

    def forward(self, *args, **kwargs) -> PreTrainingOutput:
        """Arguments are those of Model."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        follows = self.next_sentence(self.backbone.pool(rows, sequences))
        return PreTrainingOutput(sequences.pad(self.lm(rows)), follows)


BACKBONE = {
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "layers.*.attention.qkv.query": "encoder.layer.*.attention.self.query",
    "layers.*.attention.qkv.key": "encoder.layer.*.attention.self.key",
    "layers.*.attention.qkv.value": "encoder.layer.*.attention.self.value",
    "layers.*.attention.out": "encoder.layer.*.attention.output.dense",
    "layers.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "layers.*.feed_forward.up": "encoder.layer.*.intermediate.dense",
    "layers.*.feed_forward.down": "encoder.layer.*.output.dense",
    "layers.*.feed_forward_norm": "encoder.layer.*.output.LayerNorm",
    "pooler": "pooler.dense",
}
IGNORED = ("embeddings.position_ids", "cls.predictions.decoder.bias")

HEADS = {
    "BertModel": None,
    "BertForPreTraining": PreTraining,
    "BertForMaskedLM": MaskedLM,
    "BertForNextSentencePrediction": NextSentence,
    "BertForSequenceClassification": PooledClassifier,
    "BertForTokenClassification": TokenClassifier,
    "BertForQuestionAnswering": QuestionAnswering,
}
KEYS = KeyMap(
    BACKBONE,
    {
        "lm.dense": "cls.predictions.transform.dense",
        "lm.norm": "cls.predictions.transform.LayerNorm",
        "lm.decoder.bias": "cls.predictions.bias",
        "lm.decoder": "cls.predictions.decoder",
        "next_sentence": "cls.seq_relationship",
        "classifier": "classifier",
        "qa": "qa_outputs",
    },
    prefix="bert",
    ignored=IGNORED,
)
