"""RoBERTa: Liu et al., "RoBERTa: A Robustly Optimized BERT Pretraining Approach" (2019): BERT whose positions
begin after the row of the padding token, with heads of its own."""

from dataclasses import dataclass, field

from warpformer.models import bert
from warpformer.models._config import OR_ZERO
from warpformer.models._encoder import FirstTokenClassifier, MaskedLM
from warpformer.models._heads import QuestionAnswering, TokenClassifier
from warpformer.models._keys import KeyMap


@dataclass(kw_only=True)
class Config(bert.Config):
    pad_token_id: int = field(default=1, metadata=OR_ZERO)

    @property
    def max_length(self) -> int:
        """Tokens of a sequence that there are positions for."""
        return self.max_position_embeddings - self.pad_token_id - 1


class Model(bert.Model):
    def __init__(self, config: Config):
        super().__init__(config)
        self.position_offset = config.pad_token_id + 1


class GeluMaskedLM(MaskedLM):
    def __init__(self, backbone: Model, config: Config):
        super().__init__(backbone, config)
        self.lm.activation = "gelu"


HEADS = {
    "RobertaModel": None,
    "RobertaForMaskedLM": GeluMaskedLM,
    "RobertaForSequenceClassification": FirstTokenClassifier,
    "RobertaForTokenClassification": TokenClassifier,
    "RobertaForQuestionAnswering": QuestionAnswering,
}
KEYS = KeyMap(
    bert.BACKBONE,
    {
        "lm.dense": "lm_head.dense",
        "lm.norm": "lm_head.layer_norm",
        "lm.decoder.bias": "lm_head.bias",
        "lm.decoder": "lm_head.decoder",
        "dense": "classifier.dense",
        "out": "classifier.out_proj",
        "classifier": "classifier",
        "qa": "qa_outputs",
    },
    prefix="roberta",
    ignored=("embeddings.position_ids", "lm_head.decoder.bias"),
)
