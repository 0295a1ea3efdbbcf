"""Random tiny checkpoints of every architecture, as transformers writes them."""

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
    max_position_embeddings=64,
    initializer_range=0.07,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GROUPED = SIZES | dict(num_key_value_heads=2)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    long_factor=[1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
    original_max_position_embeddings=16,
)
YARN = dict(
    rope_type="yarn",
    rope_theta=10000.0,
    factor=8.0,
    original_max_position_embeddings=16,
    beta_fast=32.0,
    beta_slow=1.0,
)
DEEPSEEK = SIZES | dict(
    num_key_value_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    first_k_dense_replace=1,
    moe_intermediate_size=20,
    n_routed_experts=6,
    n_shared_experts=2,
    num_experts_per_tok=2,
)
GPT2 = dict(
    vocab_size=97,
    n_embd=48,
    n_layer=3,
    n_head=4,
    n_positions=64,
    initializer_range=0.07,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
DECODERS = {  # name -> (architecture, config)
    "llama": ("Llama", hf.LlamaConfig(**GROUPED)),
    "llama-2, tied, biases": (
        "Llama",
        hf.LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    ),
    "llama-3.1": ("Llama", hf.LlamaConfig(**GROUPED, head_dim=16, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", hf.MistralConfig(**GROUPED, sliding_window=7)),
    "qwen2": ("Qwen2", hf.Qwen2Config(**GROUPED)),
    "qwen2, windows": (
        "Qwen2",
        hf.Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3", hf.Qwen3Config(**GROUPED, head_dim=16)),
    "gemma2": (
        "Gemma2",
        hf.Gemma2Config(
            **GROUPED,
            head_dim=16,
            sliding_window=6,
            query_pre_attn_scalar=24,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=4.0,
        ),
    ),
    "phi3": ("Phi3", hf.Phi3Config(**GROUPED, sliding_window=9)),
    "phi3, long": ("Phi3", hf.Phi3Config(**GROUPED, rope_parameters=LONGROPE)),
    "nemotron": ("Nemotron", hf.NemotronConfig(**GROUPED)),
    "mixtral": (
        "Mixtral",
        hf.MixtralConfig(**GROUPED, num_local_experts=5, num_experts_per_tok=2, sliding_window=7),
    ),
    "gpt-oss": (
        "GptOss",
        hf.GptOssConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=6,
            num_local_experts=5,
            num_experts_per_tok=3,
            rope_parameters=YARN | {"truncate": False},
        ),
    ),
    "deepseek-v2, lite": ("DeepseekV2", hf.DeepseekV2Config(**DEEPSEEK, q_lora_rank=None)),
    "deepseek-v2": (
        "DeepseekV2",
        hf.DeepseekV2Config(
            **DEEPSEEK,
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=3,
            topk_group=2,
            routed_scaling_factor=2.5,
            rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 1.2},
        ),
    ),
    "gpt2": ("GPT2", hf.GPT2Config(**GPT2)),
    "gpt2, scaled": ("GPT2", hf.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, n_inner=72)),
}


def random_model(cls, config, seed=0):
    """A model of transformers whose biases, norms and embeddings of padding matter."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            elif config.pad_token_id is not None and parameter.shape[0] == config.vocab_size:
                parameter[config.pad_token_id].normal_(std=0.2)
    return model


def tokenizer(texts, begins=True):
    """Of 97 tokens, with a mask; a text ends by </s>, and begins by <s>."""
    found = Tokenizer(BPE(unk_token="<unk>"))
    found.pre_tokenizer = Whitespace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    found.train_from_iterator(texts, BpeTrainer(vocab_size=97, special_tokens=special))
    around = "<s> $A </s>" if begins else "$A </s>"
    found.post_processor = TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 2)])
    names = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    return hf.PreTrainedTokenizerFast(tokenizer_object=found, model_max_length=40, **names)


def padded_batch(length=21, vocabulary=97):
    """Ids and mask: a full row, one padded on the right, one on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -8:] = 0
    mask[2, :5] = 0
    return ids, mask


def positions(mask):
    """Of the tokens, wherever the padding is: what ours count by themselves."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def same(found, expected, tolerance):
    """Within `tolerance` of the largest."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.abs().max(), f"{error} of {expected.abs().max()}"


BERT = SIZES | dict(pad_token_id=1, initializer_range=0.2)
DISTILBERT = dict(
    vocab_size=97,
    dim=48,
    n_layers=2,
    n_heads=4,
    hidden_dim=80,
    max_position_embeddings=64,
    initializer_range=0.2,
)
ENCODERS = {
    "bert": ("Bert", hf.BertConfig(**BERT, hidden_act="gelu_new")),
    "roberta": ("Roberta", hf.RobertaConfig(**BERT, type_vocab_size=3)),
    "distilbert": ("DistilBert", hf.DistilBertConfig(**DISTILBERT, activation="relu")),
}


T5 = dict(
    vocab_size=97,
    d_model=48,
    d_kv=16,
    d_ff=80,
    num_layers=3,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
    decoder_start_token_id=0,
)
BART = dict(
    vocab_size=97,
    d_model=48,
    encoder_layers=3,
    encoder_ffn_dim=80,
    encoder_attention_heads=4,
    decoder_layers=2,
    decoder_ffn_dim=72,
    decoder_attention_heads=6,
    max_position_embeddings=40,
    init_std=0.2,
)
MARIAN = BART | dict(
    activation_function="swish", scale_embedding=True, pad_token_id=96, decoder_start_token_id=96
)
SEQ2SEQ = {
    "t5": ("T5", hf.T5Config(**T5)),
    "t5-1.1": ("T5", hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "t5-1.1, tied": ("T5", hf.T5Config(**T5, feed_forward_proj="gated-silu", tie_word_embeddings=False)),
    "mt5": ("MT5", hf.MT5Config(**T5)),
    "bart": ("Bart", hf.BartConfig(**BART, scale_embedding=True)),
    "mbart": ("MBart", hf.MBartConfig(**BART, activation_function="relu", decoder_start_token_id=5)),
    "marian": ("Marian", hf.MarianConfig(**MARIAN)),
    "marian, two tables": (
        "Marian",
        hf.MarianConfig(**MARIAN, share_encoder_decoder_embeddings=False, decoder_vocab_size=101),
    ),
}
UNTIED = ("t5-1.1", "mt5")  # whose checkpoints have an lm_head
