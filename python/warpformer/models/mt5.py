"""mT5: Xue et al., "mT5: A Massively Multilingual Pre-trained Text-to-Text Transformer" (2021): T5 1.1 of
more languages."""

from dataclasses import dataclass

from warpformer.models import t5


@dataclass(kw_only=True)
class Config(t5.Config):
    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"
    scale_decoder_outputs: bool | None = False


class Model(t5.Model):
    """T5 of other sizes."""


HEADS = t5.heads("MT5")
KEYS = t5.KEYS
