"""Training: texts, tokenizers, objectives, batches, the loop, adapters."""

from warpformer.training.batches import Batches
from warpformer.training.config import TrainConfig
from warpformer.training.evaluation import mean_loss
from warpformer.training.lora import add_lora_, load_lora_, lora_state, merge_lora_, save_lora
from warpformer.training.objectives.causal import CausalLM
from warpformer.training.objectives.denoising import Denoising
from warpformer.training.objectives.masked import MaskedLM
from warpformer.training.objectives.objective import Batch, Objective
from warpformer.training.objectives.seq2seq import Seq2Seq
from warpformer.training.objectives.span_corruption import SpanCorruption
from warpformer.training.schedule import learning_rate
from warpformer.training.text import Texts, read_texts
from warpformer.training.tokenizer import train_tokenizer
from warpformer.training.trainer import DivergedError, Result, Trainer

OBJECTIVES = {
    "causal": CausalLM,
    "denoising": Denoising,
    "masked-lm": MaskedLM,
    "seq2seq": Seq2Seq,
    "span-corruption": SpanCorruption,
}

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Batches",
    "CausalLM",
    "Denoising",
    "DivergedError",
    "MaskedLM",
    "Objective",
    "Result",
    "Seq2Seq",
    "SpanCorruption",
    "Texts",
    "TrainConfig",
    "Trainer",
    "add_lora_",
    "learning_rate",
    "load_lora_",
    "lora_state",
    "mean_loss",
    "merge_lora_",
    "read_texts",
    "save_lora",
    "train_tokenizer",
]
