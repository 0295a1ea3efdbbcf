"""Mixtral: Jiang et al., "Mixtral of Experts" (2024): Mistral whose feed-forward layers are 8 experts, of
which every token passes through 2."""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models._config import require
from warpformer.models._keys import KeyMap
from warpformer.nn import Experts, MixtureOfExperts, PreNormLayer, Router, SoftmaxTopK


@dataclass(kw_only=True)
class Config(llama.Config):
    num_key_value_heads: int | None = 8
    rms_norm_eps: float = 1e-5
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    def __post_init__(self):
        super().__post_init__()
        require_experts(
            num_experts_per_tok=self.num_experts_per_tok, num_local_experts=self.num_local_experts
        )


def require_experts(**counts: int):
    """require_experts(chosen=2, all=8): that there are as many as are chosen."""
    (chosen, k), (of, experts) = counts.items()
    require(k <= experts, f"{chosen} = {k} is over {of} = {experts}")


class Model(llama.Model):
    def __init__(self, config: Config):
        super().__init__(config, decoder_layer)


def decoder_layer(config: Config, layer: int, rotary) -> PreNormLayer:
    width, inner, experts = config.hidden_size, config.intermediate_size, config.num_local_experts
    router = Router(width, experts, SoftmaxTopK(config.num_experts_per_tok))
    parts = dict(gate_up_parts={"gate": inner, "up": inner}, down_parts={"down": width})
    mixture = MixtureOfExperts(router, Experts(experts, width, inner, config.activation, **parts))
    attention = llama.attention(config, layer, rotary)
    return PreNormLayer(llama.rms_norm(config), attention, llama.rms_norm(config), mixture)


EXPERTS = {
    "layers.*.feed_forward.router": "layers.*.block_sparse_moe.gate",
    "layers.*.feed_forward.experts.gate_up.*.gate": "layers.*.block_sparse_moe.experts.*.w1",
    "layers.*.feed_forward.experts.gate_up.*.up": "layers.*.block_sparse_moe.experts.*.w3",
    "layers.*.feed_forward.experts.down.*.down": "layers.*.block_sparse_moe.experts.*.w2",
}
HEADS = llama.heads("Mixtral")
KEYS = KeyMap(llama.ATTENTION | EXPERTS, llama.HEAD, prefix="model")
