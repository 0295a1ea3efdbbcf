"""What models take in memory once `wf.load` has read them, by the format of their linear layers:

python -m warpformer.bench.model_memory

Nothing is loaded: models are built on the meta device, where tensors have shapes only.
"""

import torch
from torch import nn

from warpformer.load import build, model_module, tied_modules
from warpformer.nn import PackedEmbedding
from warpformer.ops._quantized import resolve_group_size
from warpformer.quantization.config import METHOD, prepare_model
from warpformer.quantization.quantize_ import Plan

BERT = dict(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
)
BART = dict(
    vocab_size=50265,
    d_model=768,
    encoder_layers=6,
    encoder_ffn_dim=3072,
    encoder_attention_heads=12,
    decoder_layers=6,
    decoder_ffn_dim=3072,
    decoder_attention_heads=12,
)
SMALL = dict(
    d_model=512,
    encoder_ffn_dim=2048,
    encoder_attention_heads=8,
    decoder_ffn_dim=2048,
    decoder_attention_heads=8,
)
LARGE = dict(
    d_model=1024,
    encoder_layers=12,
    encoder_ffn_dim=4096,
    encoder_attention_heads=16,
    decoder_layers=12,
    decoder_ffn_dim=4096,
    decoder_attention_heads=16,
)


def decoder(vocabulary, length, width, inner, layers, heads, kv_heads, **others):
    return dict(
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **others,
    )


def latent(*sizes, **others):
    """DeepSeek-V2: its Lite and its full size."""
    widths = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    return decoder(*sizes, **widths, n_shared_experts=2, first_k_dense_replace=1, **others)


LITE = dict(moe_intermediate_size=1408, n_routed_experts=64, q_lora_rank=None)
# Checkpoint -> (model_type, class, what its config.json says of sizes).
MODELS = {
    "bert-base-uncased": ("bert", "BertForMaskedLM", BERT),
    "roberta-base": (
        "roberta",
        "RobertaForMaskedLM",
        BERT | dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    ),
    "distilbert-base-uncased": ("distilbert", "DistilBertForMaskedLM", {}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {}),
    "Llama-2-7b": ("llama", "LlamaForCausalLM", decoder(32000, 4096, 4096, 11008, 32, 32, 32)),
    "Llama-3.1-8B": ("llama", "LlamaForCausalLM", decoder(128256, 131072, 4096, 14336, 32, 32, 8)),
    "Mistral-7B-v0.1": ("mistral", "MistralForCausalLM", decoder(32000, 32768, 4096, 14336, 32, 32, 8)),
    "Mixtral-8x7B-v0.1": (
        "mixtral",
        "MixtralForCausalLM",
        decoder(32000, 32768, 4096, 14336, 32, 32, 8, num_local_experts=8),
    ),
    "Qwen2-7B": ("qwen2", "Qwen2ForCausalLM", decoder(152064, 131072, 3584, 18944, 28, 28, 4)),
    "Qwen3-8B": ("qwen3", "Qwen3ForCausalLM", decoder(151936, 40960, 4096, 12288, 36, 32, 8, head_dim=128)),
    "gemma-2-9b": (
        "gemma2",
        "Gemma2ForCausalLM",
        decoder(256000, 8192, 3584, 14336, 42, 16, 8, head_dim=256),
    ),
    "Phi-3-mini-4k-instruct": ("phi3", "Phi3ForCausalLM", decoder(32064, 4096, 3072, 8192, 32, 32, 32)),
    "Minitron-4B-Base": (
        "nemotron",
        "NemotronForCausalLM",
        decoder(256000, 4096, 3072, 9216, 32, 24, 8, head_dim=128),
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        "GptOssForCausalLM",
        decoder(201088, 131072, 2880, 2880, 24, 64, 8, head_dim=64, num_local_experts=32),
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        latent(
            102400,
            163840,
            2048,
            10944,
            27,
            16,
            16,
            moe_intermediate_size=1408,
            n_routed_experts=64,
            q_lora_rank=None,
        ),
    ),
    "DeepSeek-V2": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        latent(102400, 163840, 5120, 12288, 60, 128, 128, moe_intermediate_size=1536, n_routed_experts=160),
    ),
    "grok-1": ("grok-1", "Grok1ModelForCausalLM", decoder(131072, 8192, 6144, 32768, 64, 48, 8)),
    "t5-small": ("t5", "T5ForConditionalGeneration", {}),
    "mt5-small": ("mt5", "MT5ForConditionalGeneration", {}),
    "bart-base": ("bart", "BartModel", BART),
    "mbart-large-cc25": ("mbart", "MBartForConditionalGeneration", LARGE | dict(vocab_size=250027)),
    "opus-mt-en-de": (
        "marian",
        "MarianMTModel",
        BART | SMALL | dict(vocab_size=58101, max_position_embeddings=512),
    ),
    "Transformer (base)": ("transformer", "TransformerForConditionalGeneration", {}),
}
FORMATS = {  # column -> dtype of what is not quantized, mode of wf.quantize_
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}


def new_model(model_type: str, architecture: str, sizes: dict) -> nn.Module:
    """On the meta device."""
    values = {"model_type": model_type, "architectures": [architecture], **sizes}
    with torch.device("meta"):
        return build(model_module(values), values)


def pack_(model: nn.Module, dtype: torch.dtype, mode: str | None = None) -> nn.Module:
    """Makes of a model on the meta device what `wf.load` makes of its checkpoint."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if mode is not None:
        prepare_model(model, quantization_config(model, mode))
        for parameter in model.parameters():  # and of the layers that are new
            parameter.data = parameter.data.to(dtype)
    for name in [name for name, module in model.named_modules() if hasattr(module, "to_packed")]:
        packed = model.get_submodule(name).to_packed()
        model.set_submodule(name, packed)
        if name in tied_modules(model):
            model.set_submodule(tied_modules(model)[name], PackedEmbedding(packed))
    return model


def quantization_config(model: nn.Module, mode: str) -> dict:
    """Which layers `wf.quantize_` chooses."""
    plan = Plan(model, mode)
    layers = {name: layer for name, layer in plan.layers.items() if name not in plan.notes}
    sizes = {name: resolve_group_size(mode, layer.in_features, None) for name, layer in layers.items()}
    groups = [
        dict(format=mode, group_size=size, zero_points=False, layers=[name]) for name, size in sizes.items()
    ]
    return {"quant_method": METHOD, "groups": groups}


def held_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def amount(count: int, base: int, small: str, large: str) -> str:
    """In millions, and from a thousand of them on in those."""
    return f"{count / base**2:.0f} {small}" if count < base**3 else f"{count / base**3:.1f} {large}"


def table() -> str:
    """The table of docs/models.md."""
    lines = ["| checkpoint | `model_type` | parameters |" + "".join(f" {name} |" for name in FORMATS)]
    lines.append("|---|---|" + "--:|" * (1 + len(FORMATS)))
    for name, model in MODELS.items():
        count = sum(parameter.numel() for parameter in new_model(*model).parameters())
        held = [held_bytes(pack_(new_model(*model), *options)) for options in FORMATS.values()]
        cells = [name, f"`{model[0]}`", amount(count, 1000, "M", "B")]
        cells += [amount(size, 1024, "MiB", "GiB") for size in held]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
