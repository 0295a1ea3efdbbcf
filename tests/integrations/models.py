"""Small random models of transformers, and batches for them."""

from types import SimpleNamespace

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

V, PAD = 99, 0
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TOKENS = dict(pad_token_id=PAD, bos_token_id=None, eos_token_id=None)
GQA = dict(num_key_value_heads=2, max_position_embeddings=64)
WINDOW = 5
BART = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4, forced_eos_token_id=None)
T5 = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, relative_attention_num_buckets=8)
T5 |= dict(relative_attention_max_distance=12)
STARTED = dict(vocab_size=V, pad_token_id=PAD, eos_token_id=None, decoder_start_token_id=PAD)

MODELS = {
    "bert": (AutoModelForMaskedLM, SIZES | TOKENS),
    "roberta": (AutoModelForMaskedLM, SIZES | TOKENS),
    "gpt2": (AutoModelForCausalLM, dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4) | TOKENS),
    "bart": (AutoModelForSeq2SeqLM, BART | STARTED),
    "t5": (AutoModelForSeq2SeqLM, T5 | STARTED),
    "t5_gated": (AutoModelForSeq2SeqLM, T5 | STARTED | dict(feed_forward_proj="gated-gelu")),
    "llama": (AutoModelForCausalLM, SIZES | TOKENS | GQA),
    "mistral": (AutoModelForCausalLM, SIZES | TOKENS | GQA | dict(sliding_window=WINDOW)),
    "mixtral": (
        AutoModelForCausalLM,
        SIZES | TOKENS | GQA | dict(sliding_window=WINDOW, num_local_experts=4),
    ),
    "gemma2": (
        AutoModelForCausalLM,
        SIZES | TOKENS | GQA | dict(sliding_window=WINDOW, head_dim=8, attn_logit_softcapping=2.0),
    ),
    "phi3": (AutoModelForCausalLM, SIZES | TOKENS | GQA | dict(sliding_window=WINDOW)),
    "gpt_oss": (
        AutoModelForCausalLM,
        SIZES | TOKENS | GQA | dict(sliding_window=WINDOW, head_dim=8, num_local_experts=4),
    ),
    "qwen2_moe": (
        AutoModelForCausalLM,
        SIZES | TOKENS | GQA
        | dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, num_experts=4)
        | dict(moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2),
    ),
    "modernbert": (
        AutoModelForMaskedLM,
        SIZES | TOKENS | dict(local_attention=2 * WINDOW, global_attn_every_n_layers=2, cls_token_id=1)
        | dict(sep_token_id=2),
    ),
}  # fmt: skip


def make(name, attn_implementation=None):
    """A model whose attention and norms matter: at the scale that models begin with, they hardly do."""
    auto, arguments = MODELS[name]
    config = transformers.AutoConfig.for_model(name.removesuffix("_gated"), **arguments)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    model = auto.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25)
    model.generation_config = transformers.GenerationConfig(
        pad_token_id=PAD, max_new_tokens=12, do_sample=False, disable_compile=True,
        decoder_start_token_id=arguments.get("decoder_start_token_id"),
    )  # fmt: skip
    return model


def batch(padding=None, rows=3, tokens=14):
    """Inputs with labels; `padding` on the "left" or "right" of all rows but one."""
    torch.manual_seed(2)
    ids = torch.randint(3, V, (rows, tokens))
    mask = torch.ones_like(ids)
    for row in range(1, rows if padding else 0):
        mask[row, : 4 * row] = 0
    if padding == "right":
        mask = mask.flip(1)
    ids = ids.where(mask == 1, PAD)
    labels = ids.where(mask == 1, -100)
    if padding == "left":  # what padding predicts is nobody's business
        labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return SimpleNamespace(ids=ids, mask=mask, labels=labels)
