"""Mistral: Jiang et al., "Mistral 7B" (2023): Llama whose queries see a window of keys."""

from dataclasses import dataclass

from warpformer.models import llama
from warpformer.models.llama import KEYS

__all__ = ["HEADS", "KEYS", "Config", "Model"]


@dataclass(kw_only=True)
class Config(llama.Config):
    num_key_value_heads: int = 8


class Model(llama.Model):
    pass


HEADS = llama.heads("Mistral")
