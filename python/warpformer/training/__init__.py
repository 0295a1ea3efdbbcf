"""Training: texts, tokenizers, objectives, batches."""

from warpformer.training.batches import Batches
from warpformer.training.objectives.causal import CausalLM
from warpformer.training.objectives.objective import Batch, Objective
from warpformer.training.objectives.seq2seq import Seq2Seq
from warpformer.training.text import Texts, read_texts
from warpformer.training.tokenizer import train_tokenizer

OBJECTIVES = {"causal": CausalLM, "seq2seq": Seq2Seq}

__all__ = [
    "OBJECTIVES",
    "Batch",
    "Batches",
    "CausalLM",
    "Objective",
    "Seq2Seq",
    "Texts",
    "read_texts",
    "train_tokenizer",
]
