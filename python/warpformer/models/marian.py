"""Marian: Junczys-Dowmunt et al., "Marian: Fast Neural Machine Translation in C++" (2018), as OPUS-MT has it:
Tiedemann and Thottingal, "OPUS-MT: Building open translation services for the World" (2020).

BART with sinusoidal positions, sines first, and without a norm of the embeddings.
"""

from dataclasses import dataclass, field

from warpformer.models import bart
from warpformer.models._config import OR_ZERO
from warpformer.models._init import init_
from warpformer.models._keys import KeyMap
from warpformer.models._seq2seq import Seq2Seq
from warpformer.nn import Embedding, PostNormCrossLayer, PostNormLayer, SinusoidalPositions


@dataclass(kw_only=True)
class Config(bart.Config):
    vocab_size: int = 58101
    decoder_vocab_size: int | None = None
    share_encoder_decoder_embeddings: bool = True
    decoder_start_token_id: int | None = field(default=58100, metadata=OR_ZERO)
    eos_token_id: int | list | None = field(default=0, metadata=OR_ZERO)
    pad_token_id: int | None = field(default=58100, metadata=OR_ZERO)

    def __post_init__(self):
        super().__post_init__()
        if self.decoder_vocab_size is None:
            self.decoder_vocab_size = self.vocab_size


class Model(Seq2Seq):
    """A relative gives the classes of its layers, the order of sines, whether the stacks end with a norm."""

    def __init__(
        self,
        config: Config,
        layer=PostNormLayer,
        cross_layer=PostNormCrossLayer,
        *,
        interleaved: bool = False,
        has_norm: bool = False,
    ):
        width, is_shared = config.d_model, config.share_encoder_decoder_embeddings

        def around(vocabulary):
            return dict(
                tokens=None if is_shared else Embedding(vocabulary, width),
                positions=SinusoidalPositions(width, interleaved=interleaved, max_length=config.max_length),
                norm=bart.norm(config) if has_norm else None,
            )

        super().__init__(
            config,
            bart.encoder(config, layer, **around(config.vocab_size)),
            bart.decoder(config, cross_layer, **around(config.decoder_vocab_size)),
            Embedding(config.vocab_size, width) if is_shared else None,
            config.embedding_scale,
        )
        init_(self, config.init_std)


POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")  # computed, not read

HEADS = {"MarianMTModel": bart.ConditionalGeneration, "MarianModel": None}
KEYS = KeyMap(bart.BACKBONE, bart.HEAD, prefix="model", ignored=POSITIONS)
