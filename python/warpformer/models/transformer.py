"""The Transformer: Vaswani et al., "Attention Is All You Need" (2017), to be trained.

    x = sqrt(d_model) tokens[input_ids] + sinusoids[position]          of the encoder, and of the decoder
    x = layer_norm(x + out(attention(qkv(x))))                         for each layer
    x = layer_norm(x + out(attention(q(x), kv(memory))))               in the decoder
    x = layer_norm(x + fc2(relu(fc1(x))))
    logits = tokens x

With norm_first the norms are before the blocks and at the ends of encoder and decoder. config.json and the
names of tensors are in the style of BART; `load_torch_` takes the parameters of a torch.nn.Transformer.

    config = transformer.Config(vocab_size=32000, encoder_layers=6, decoder_layers=6)
    model = transformer.ConditionalGeneration(transformer.Model(config), config)
"""

from dataclasses import dataclass, field

from torch import nn

from warpformer._C import InputError
from warpformer.models import bart, marian
from warpformer.models._config import OR_ZERO, require
from warpformer.models._init import init_
from warpformer.models._keys import KeyMap
from warpformer.models._seq2seq_heads import Seq2SeqLM
from warpformer.nn import (
    FusedLinear,
    Linear,
    PostNormCrossLayer,
    PostNormLayer,
    PreNormCrossLayer,
    PreNormLayer,
)


@dataclass(kw_only=True)
class Config(marian.Config):
    """The base model of the paper. decoder_vocab_size counts where share_encoder_decoder_embeddings is false;
    tie_word_embeddings: the output layer's weight is the decoder's table. final_norm: encoder and decoder end
    with a norm, as those of torch.nn.Transformer do; norm_first if None."""

    vocab_size: int = 37000
    max_position_embeddings: int = 1024
    d_model: int = 512
    encoder_layers: int = 6
    encoder_ffn_dim: int = 2048
    encoder_attention_heads: int = 8
    decoder_layers: int = 6
    decoder_ffn_dim: int = 2048
    decoder_attention_heads: int = 8
    activation_function: str = "relu"
    scale_embedding: bool = True
    norm_first: bool = False
    final_norm: bool | None = None
    layer_norm_eps: float = 1e-5
    decoder_start_token_id: int | None = field(default=None, metadata=OR_ZERO)
    eos_token_id: int | list | None = field(default=None, metadata=OR_ZERO)
    pad_token_id: int | None = field(default=None, metadata=OR_ZERO)

    def __post_init__(self):
        super().__post_init__()
        require(self.layer_norm_eps >= 0, f"layer_norm_eps = {self.layer_norm_eps} is negative")
        if self.final_norm is None:
            self.final_norm = self.norm_first


class Model(marian.Model):
    def __init__(self, config: Config):
        layers = (
            (PreNormLayer, PreNormCrossLayer) if config.norm_first else (PostNormLayer, PostNormCrossLayer)
        )
        super().__init__(config, *layers, interleaved=True, has_norm=config.final_norm)
        init_(self, config.d_model**-0.5)  # for the tables
        for layer in self.modules():
            if isinstance(layer, Linear):
                parts = list(layer.parts.values()) if isinstance(layer, FusedLinear) else layer.out_features
                for weight in layer.weight.split(parts):
                    nn.init.xavier_uniform_(weight)


class ConditionalGeneration(Seq2SeqLM):
    """Logits of the next token of the decoder: lm_head(backbone(...))."""

    def __init__(self, backbone: Model, config: Config):
        super().__init__(backbone, config, tied=config.tie_word_embeddings)
        if not config.tie_word_embeddings:
            nn.init.xavier_uniform_(self.lm_head.weight)


HEADS = {"TransformerForConditionalGeneration": ConditionalGeneration, "TransformerModel": None}
KEYS = KeyMap(bart.BACKBONE, bart.HEAD, prefix="model")


def load_torch_(model: Model, transformer: nn.Transformer) -> None:
    """Gives a model the parameters of a torch.nn.Transformer of its sizes, which has final norms. The tables
    of tokens stay.

    Raises:
        InputError: a parameter of one is not there in the other.
        RuntimeError: the shapes differ.
    """
    names, state = model.state_dict().keys(), {}
    for key, value in transformer.state_dict().items():
        module, _, leaf = key.rpartition(".")
        kind = leaf.removeprefix("in_proj_")
        parts = {key: value}
        if kind != leaf:
            parts = {
                f"{module}.{name}.{kind}": rows for name, rows in zip("qkv", value.chunk(3), strict=True)
            }
        state |= {TORCH.ours(name, names): rows for name, rows in parts.items()}
    differing = {name for name in names ^ state.keys() if not name.endswith("tokens.weight")}
    if differing:
        raise InputError(f"load_torch_: only one of the models has {sorted(differing)[:8]}")
    model.load_state_dict(state, strict=False)


def torch_keys(stack: str, norms: list[str]) -> dict[str, str]:
    """Of the encoder or the decoder of torch.nn.Transformer, of which in_proj is cut."""
    layer = f"{stack}.layers.*"
    return {
        f"{stack}.norm": f"{stack}.norm",
        **{f"{layer}.attention.qkv.{part}": f"{layer}.self_attn.{part}" for part in "qkv"},
        f"{layer}.attention.out": f"{layer}.self_attn.out_proj",
        f"{layer}.cross_attention.q": f"{layer}.multihead_attn.q",
        f"{layer}.cross_attention.kv.k": f"{layer}.multihead_attn.k",
        f"{layer}.cross_attention.kv.v": f"{layer}.multihead_attn.v",
        f"{layer}.cross_attention.out": f"{layer}.multihead_attn.out_proj",
        f"{layer}.feed_forward.up": f"{layer}.linear1",
        f"{layer}.feed_forward.down": f"{layer}.linear2",
        **{f"{layer}.{name}_norm": f"{layer}.norm{i + 1}" for i, name in enumerate(norms)},
    }


TORCH = KeyMap(
    torch_keys("encoder", ["attention", "feed_forward"])
    | torch_keys("decoder", ["attention", "cross_attention", "feed_forward"]),
    {},
)
