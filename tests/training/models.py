"""A small model for each objective."""

import torch

from warpformer.models import bart, bert, llama, t5, transformer
from warpformer.models._config import read_config
from warpformer.training import CausalLM, Denoising, MaskedLM, Seq2Seq, SpanCorruption

HEADS = dict(num_attention_heads=2, encoder_attention_heads=2, decoder_attention_heads=2, num_heads=2)
LAYERS = dict(num_hidden_layers=1, encoder_layers=1, decoder_layers=1, num_layers=1)
WIDTHS = dict(d_model=32, hidden_size=32, d_kv=16)
INNER = dict(intermediate_size=48, encoder_ffn_dim=48, decoder_ffn_dim=48, d_ff=48)
NO_DROPOUT = dict(dropout=0.0, dropout_rate=0.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
SIZES = HEADS | LAYERS | WIDTHS | INNER | NO_DROPOUT | dict(max_position_embeddings=128)
ARCHITECTURES = {
    CausalLM: (llama, "LlamaForCausalLM"),
    Denoising: (bart, "BartForConditionalGeneration"),
    MaskedLM: (bert, "BertForPreTraining"),
    Seq2Seq: (transformer, "TransformerForConditionalGeneration"),
    SpanCorruption: (t5, "T5ForConditionalGeneration"),
}
OBJECTIVES = [*ARCHITECTURES]


def make_objective(cls, pairs, english, tokenizer, **options):
    texts = pairs if cls is Seq2Seq else english
    return cls(texts, tokenizer, **dict(max_length=128 if cls is Seq2Seq else 64) | options)


def make_model(objective, tokenizer):
    module, architecture = ARCHITECTURES[type(objective)]
    values = SIZES | objective.token_ids | dict(vocab_size=tokenizer.get_vocab_size())
    config = read_config(module.Config, values)
    torch.manual_seed(0)
    return module.HEADS[architecture](module.Model(config), config)
