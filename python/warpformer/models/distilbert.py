"""DistilBERT: Sanh et al., "DistilBERT, a distilled version of BERT" (2019): BERT without token types and
pooler, with heads of its own."""

from dataclasses import dataclass

from warpformer.models import bert
from warpformer.models._config import Labels, activation_of, require_layers, require_multiple
from warpformer.models._encoder import Encoder, FirstTokenClassifier, MaskedLM
from warpformer.models._heads import QuestionAnswering, TokenClassifier
from warpformer.models._keys import KeyMap
from warpformer.nn import Embedding


@dataclass(kw_only=True)
class Config(Labels):
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    n_layers: int = 6
    n_heads: int = 12
    dim: int = 768
    hidden_dim: int = 3072
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation: str = "gelu"
    seq_classif_dropout: float = 0.2
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        require_layers(n_layers=self.n_layers)
        require_multiple(dim=self.dim, n_heads=self.n_heads)
        self.activation = activation_of("activation", self.activation)

    @property
    def hidden_size(self) -> int:
        return self.dim

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that there are positions for."""
        return self.max_position_embeddings

    @property
    def layer_norm_eps(self) -> float:
        return 1e-12

    @property
    def classifier_dropout(self) -> float:
        return self.seq_classif_dropout

    @property
    def as_bert(self) -> bert.Config:
        """The layers are those of BERT."""
        return bert.Config(
            vocab_size=self.vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.hidden_dim,
            max_position_embeddings=self.max_position_embeddings,
            hidden_act=self.activation,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
        )


class Model(Encoder):
    def __init__(self, config: Config):
        like = config.as_bert
        super().__init__(
            config,
            Embedding(config.vocab_size, config.dim),
            Embedding(config.max_position_embeddings, config.dim),
            None,
            bert.norm(like),
            [bert.encoder_layer(like) for _ in range(config.n_layers)],
            None,
            dropout=config.dropout,
        )


class ReluFirstTokenClassifier(FirstTokenClassifier):
    activation = "relu"


HEADS = {
    "DistilBertModel": None,
    "DistilBertForMaskedLM": MaskedLM,
    "DistilBertForSequenceClassification": ReluFirstTokenClassifier,
    "DistilBertForTokenClassification": TokenClassifier,
    "DistilBertForQuestionAnswering": QuestionAnswering,
}
KEYS = KeyMap(
    {
        "tokens": "embeddings.word_embeddings",
        "positions": "embeddings.position_embeddings",
        "norm": "embeddings.LayerNorm",
        "layers.*.attention.qkv.query": "transformer.layer.*.attention.q_lin",
        "layers.*.attention.qkv.key": "transformer.layer.*.attention.k_lin",
        "layers.*.attention.qkv.value": "transformer.layer.*.attention.v_lin",
        "layers.*.attention.out": "transformer.layer.*.attention.out_lin",
        "layers.*.attention_norm": "transformer.layer.*.sa_layer_norm",
        "layers.*.feed_forward.up": "transformer.layer.*.ffn.lin1",
        "layers.*.feed_forward.down": "transformer.layer.*.ffn.lin2",
        "layers.*.feed_forward_norm": "transformer.layer.*.output_layer_norm",
    },
    {
        "lm.dense": "vocab_transform",
        "lm.norm": "vocab_layer_norm",
        "lm.decoder": "vocab_projector",
        "dense": "pre_classifier",
        "out": "classifier",
        "classifier": "classifier",
        "qa": "qa_outputs",
    },
    prefix="distilbert",
)
