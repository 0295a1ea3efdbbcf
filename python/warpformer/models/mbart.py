"""mBART: Liu et al., "Multilingual Denoising Pre-training for Neural Machine Translation" (2020): BART with
norms before attention and feed-forward blocks, and one at the end of encoder and decoder."""

from dataclasses import dataclass, field

from torch import Tensor

from warpformer.models import bart
from warpformer.models._config import OR_ZERO
from warpformer.models._seq2seq_heads import LastEosClassifier, ShiftedQuestionAnswering
from warpformer.nn import PreNormCrossLayer, PreNormLayer


@dataclass(kw_only=True)
class Config(bart.Config):
    decoder_start_token_id: int | None = field(default=None, metadata=OR_ZERO)

    unnamed_labels = 2


class Model(bart.Model):
    def __init__(self, config: Config):
        super().__init__(config, PreNormLayer, PreNormCrossLayer, has_norm=True)

    def first_token(self, last: Tensor) -> Tensor:
        return last  # names the language


HEADS = {
    "MBartForConditionalGeneration": bart.ConditionalGeneration,
    "MBartModel": None,
    "MBartForSequenceClassification": LastEosClassifier,
    "MBartForQuestionAnswering": ShiftedQuestionAnswering,
}
KEYS = bart.KEYS
