"""What llama.cpp's `general.architecture` are in transformers: the fields of a config.json, and where each
tensor is in a checkpoint. To add one: its tables, and a test in tests/gguf/test_architectures.py.

`gguf.get_tensor_name_map` has many names of checkpoints for one of llama.cpp's, of all models that ever had
it, and making one of an architecture with tables of its own changes those made later: it cannot be inverted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from warpformer.gguf._tensor import interleaved, keys_and_values
from warpformer.models._config import CheckpointError

FIELDS = {  # of the metadata, after "<architecture>." -> of config.json
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
DECODER_FIELDS = FIELDS | {
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
TOKENS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
MIXTURE = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.*.w1",
    "ffn_up_exps": "block_sparse_moe.experts.*.w3",
    "ffn_down_exps": "block_sparse_moe.experts.*.w2",
}
GATING = {None: "softmax", 1: "softmax", 2: "sigmoid"}  # of routers, as llama.cpp counts them
ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        model_type, model: of config.json; the class that `architectures` names.
        top, layer: llama.cpp's names of modules -> a checkpoint's, those of a layer after `layers` and its
            number; * is the number of an expert. With .weight or .bias they are names of tensors.
        joins: a checkpoint's name of a tensor of a layer -> llama.cpp's of those that it is made of, and how.
        fields: after the name of the architecture in the metadata -> in config.json.
        constants: fields that llama.cpp knows by the architecture.
        finish: (config, metadata of the architecture, tensors) -> more fields.
        rope_pairs: whether rows of queries and keys lie as an interleaved rope takes them.
        norm_offset: what was added to the weights of norms.
    """

    model_type: str
    model: str
    layer: Mapping[str, str]
    top: Mapping[str, str] = field(default_factory=lambda: TOP)
    joins: Mapping[str, tuple[tuple[str, ...], Callable]] = field(default_factory=dict)
    layers: str = "model.layers."
    fields: Mapping[str, str] = field(default_factory=lambda: DECODER_FIELDS)
    constants: Mapping[str, object] = field(default_factory=dict)
    finish: Callable[[dict, dict, dict], dict] = lambda config, own, tensors: {}
    rope_pairs: bool = False
    norm_offset: float = 0.0

    def config(self, metadata: dict, tensors: dict) -> dict:
        """Fields of the config.json, with the types that the file has; `tensors` by llama.cpp's names."""
        own = of_architecture(metadata)
        config = {"model_type": self.model_type, "architectures": [self.model], **self.constants}
        config |= {theirs: own[key] for key, theirs in self.fields.items() if key in own}
        config |= {theirs: metadata[key] for key, theirs in TOKENS.items() if key in metadata}
        if "token_embd.weight" in tensors:
            config["vocab_size"] = tensors["token_embd.weight"].shape[0]
        if "output" in self.top:
            config["tie_word_embeddings"] = "output.weight" not in tensors
        return config | self.finish(config, own, tensors)

    def names(self, key: str, experts: int) -> list[str]:
        """Of the tensor `key` in a checkpoint, those of all experts; none if it is not known."""
        stem, _, leaf = key.rpartition(".")
        if stem in self.top:
            return [f"{self.top[stem]}.{leaf}"]
        block, _, rest = stem.partition(".")
        number, _, stem = rest.partition(".")
        found = self.layer.get(f"{stem}.{leaf}") or (stem in self.layer and f"{self.layer[stem]}.{leaf}")
        if block != "blk" or not found or not number.isdecimal():
            return []
        name = f"{self.layers}{number}.{found}"
        return [name.replace("*", str(e)) for e in range(experts)] if "*" in name else [name]

    def joined(self, tensors: dict) -> dict:
        """`tensors`, with what `joins` makes of some of them in their place."""
        tensors = dict(tensors)
        for theirs, (names, join) in self.joins.items():
            for key in [key for key in tensors if key.startswith("blk.") and key.endswith(f".{names[0]}")]:
                block = key.removesuffix(names[0])
                if all(block + name in tensors for name in names):
                    parts = [tensors.pop(block + name) for name in names]
                    tensors[f"{self.layers}{block.removeprefix('blk.')}{theirs}"] = join(*parts)
        return tensors


def of_architecture(metadata: dict) -> dict:
    prefix = f"{metadata['general.architecture']}."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def rope_scaling(config, own, tensors):
    """How the rope is extended. Factors of each frequency, as Llama 3 has them, are a LongRoPE that has the
    same ones for long sequences."""
    length = own.get("rope.scaling.original_context_length")
    original = {} if length is None else {"original_max_position_embeddings": length}
    kind = own.get("rope.scaling.type")
    if ROPE_FACTORS in tensors:
        factors = _factors(tensors, ROPE_FACTORS)
        scaling = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        return {"rope_scaling": scaling | {"attention_factor": 1.0} | original}
    if any(key in tensors for key in LONGROPE_FACTORS):
        short, long = (_factors(tensors, key) for key in LONGROPE_FACTORS)
        scaling = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        if "rope.scaling.attn_factor" in own:
            scaling["attention_factor"] = own["rope.scaling.attn_factor"]
        return {"rope_scaling": scaling | original, **original}
    if kind in (None, "none"):
        return dict(original)
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"rope.scaling.type = {kind!r:.80} has no tensors of factors")
    scaling = {"rope_type": kind, "factor": own.get("rope.scaling.factor")} | original
    options = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    for theirs, key in options.items():
        if f"rope.scaling.yarn_{key}" in own:
            scaling[theirs] = own[f"rope.scaling.yarn_{key}"]
    return {"rope_scaling": scaling}


def _factors(tensors, key):
    tensor = tensors.get(key)
    if tensor is None or len(tensor.shape) != 1 or tensor.shape[0] > 1 << 16:
        raise CheckpointError(f"the tensor {key!r} of {tensor and list(tensor.shape)} is no list of factors")
    return tensor.read_dense().tolist()


def partial_rope(config, own, tensors):
    """The part of a head that rotates."""
    fields = rope_scaling(config, own, tensors)
    rotated, width = own.get("rope.dimension_count"), config.get("head_dim") or _quotient(config)
    if type(rotated) is type(width) is int and width > 0:
        fields["partial_rotary_factor"] = rotated / width
    return fields


def _quotient(config):
    """Width of a head where there is no other; None if it is none."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return width // heads if type(width) is type(heads) is int and heads > 0 else None


def llama(config, own, tensors):
    fields = rope_scaling(config, own, tensors)
    fields["attention_bias"] = "blk.0.attn_q.bias" in tensors
    fields["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return fields


def mixtral(config, own, tensors):
    return rope_scaling(config, own, tensors) | {
        "num_local_experts": own.get("expert_count"),
        "num_experts_per_tok": own.get("expert_used_count"),
    }


def gpt_oss(config, own, tensors):
    fields = rope_scaling(config, own, tensors)
    if "rope_scaling" in fields:
        fields["rope_scaling"]["truncate"] = False
    return fields | {
        "intermediate_size": own.get("expert_feed_forward_length", config.get("intermediate_size")),
        "num_local_experts": own.get("expert_count"),
        "num_experts_per_tok": own.get("expert_used_count"),
        "sliding_window": own.get("attention.sliding_window"),
    }


def deepseek_v2(config, own, tensors):
    """Of those of keys and values, attention.key_length and value_length are what a cache has since llama.cpp
    also stores the absorbed form; then the _mla ones are those of a head."""
    fields = rope_scaling(config, own, tensors)
    if "rope.scaling.yarn_log_multiplier" in own and "rope_scaling" in fields:
        mscale = 10 * own["rope.scaling.yarn_log_multiplier"]
        fields["rope_scaling"] |= {"mscale": mscale, "mscale_all_dim": mscale}
    key, value = (
        own.get(f"attention.{kind}_length_mla", own.get(f"attention.{kind}_length"))
        for kind in ("key", "value")
    )
    rotated = own.get("rope.dimension_count")
    groups = own.get("expert_group_count")
    return fields | {
        "num_key_value_heads": config.get("num_attention_heads"),
        "q_lora_rank": own.get("attention.q_lora_rank"),
        "kv_lora_rank": own.get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key - rotated if type(key) is type(rotated) is int else None,
        "v_head_dim": value,
        "first_k_dense_replace": own.get("leading_dense_block_count"),
        "moe_intermediate_size": own.get("expert_feed_forward_length"),
        "n_routed_experts": own.get("expert_count"),
        "n_shared_experts": own.get("expert_shared_count"),
        "num_experts_per_tok": own.get("expert_used_count"),
        "routed_scaling_factor": own.get("expert_weights_scale"),
        "norm_topk_prob": own.get("expert_weights_norm"),
        "scoring_func": GATING.get(own.get("expert_gating_func"), "unknown"),
        "topk_method": "group_limited_greedy" if groups else "greedy",
        "n_group": groups,
        "topk_group": own.get("expert_group_used_count"),
    }


def gemma2(config, own, tensors):
    # The 27 B model, of 46 layers, alone has another scale than that of its heads.
    is_27b = config.get("num_hidden_layers") == 46
    return {
        "query_pre_attn_scalar": _quotient(config) if is_27b else config.get("head_dim"),
        "sliding_window": own.get("attention.sliding_window"),
        "attn_logit_softcapping": own.get("attn_logit_softcapping"),
        "final_logit_softcapping": own.get("final_logit_softcapping"),
    }


def phi3(config, own, tensors):
    window = own.get("attention.sliding_window") or None  # 0 of Phi-4, which has none
    return partial_rope(config, own, tensors) | {"sliding_window": window}


def bert(config, own, tensors):
    types = tensors.get("token_types.weight")
    return {} if types is None else {"type_vocab_size": types.shape[0]}


LLAMA = Architecture("llama", "LlamaForCausalLM", ATTENTION | GATED, finish=llama, rope_pairs=True)
MIXTRAL = Architecture("mixtral", "MixtralForCausalLM", ATTENTION | MIXTURE, finish=mixtral, rope_pairs=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", ATTENTION | GATED, finish=rope_scaling),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        ATTENTION | GATED | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
        finish=rope_scaling,
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        ATTENTION
        | GATED
        | {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        constants={"hidden_activation": "gelu_pytorch_tanh"},
        finish=gemma2,
        norm_offset=1.0,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        ATTENTION
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        finish=phi3,
    ),
    "nemotron": Architecture(
        "nemotron",
        "NemotronForCausalLM",
        ATTENTION | {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
        fields=DECODER_FIELDS | {"attention.layer_norm_epsilon": "norm_eps"},
        constants={"hidden_act": "relu2"},
        finish=partial_rope,
        norm_offset=1.0,
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        "GptOssForCausalLM",
        {key: value for key, value in ATTENTION.items() if key != "ffn_norm"}
        | {
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks.weight": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
            "ffn_down_exps.weight": "mlp.experts.down_proj",
            "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
        },
        joins={
            "mlp.experts.gate_up_proj": (("ffn_gate_exps.weight", "ffn_up_exps.weight"), interleaved),
            "mlp.experts.gate_up_proj_bias": (("ffn_gate_exps.bias", "ffn_up_exps.bias"), interleaved),
        },
        finish=gpt_oss,
    ),
    "deepseek2": Architecture(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        ATTENTION
        | GATED
        | {
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_exps": "mlp.experts.*.gate_proj",
            "ffn_up_exps": "mlp.experts.*.up_proj",
            "ffn_down_exps": "mlp.experts.*.down_proj",
            "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
            "ffn_up_shexp": "mlp.shared_experts.up_proj",
            "ffn_down_shexp": "mlp.shared_experts.down_proj",
        },
        joins={"self_attn.kv_b_proj.weight": (("attn_k_b.weight", "attn_v_b.weight"), keys_and_values)},
        fields={key: value for key, value in DECODER_FIELDS.items() if key != "attention.key_length"},
        finish=deepseek_v2,
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        top={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h.",
        fields={
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
    ),
    "bert": Architecture(
        "bert",
        "BertModel",
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense",
            "layer_output_norm": "output.LayerNorm",
        },
        top={
            "token_embd": "embeddings.word_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        layers="encoder.layer.",
        fields=FIELDS | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        finish=bert,
    ),
}


def architecture_of(metadata: dict) -> Architecture:
    name = metadata.get("general.architecture")
    if type(name) is not str or name not in ARCHITECTURES:
        raise CheckpointError(f"general.architecture = {name!r:.80} is none of {[*ARCHITECTURES]}")
    is_mixture = name == "llama" and of_architecture(metadata).get("expert_count")
    return MIXTRAL if is_mixture else ARCHITECTURES[name]
