"""Names, values and configs, against what transformers reads from the same files."""

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType as Type
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.check import same_bits
from tests.gguf.files import LLAMA, quantized, write
from warpformer import ops
from warpformer.gguf import open_gguf
from warpformer.gguf._architectures import ARCHITECTURES
from warpformer.quantization import dequantize

SIZES = dict(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rope_theta=5e5,
    pad_token_id=0,
)
RMS = dict(**SIZES, rms_norm_eps=1e-5)
FIELDS = LLAMA | {"block_count": 2}
GPT2 = {key: FIELDS[key] for key in ("context_length", "embedding_length", "block_count")}
GPT2 |= {"feed_forward_length": 256, "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5}
# architecture -> (config of transformers, metadata)
CASES = {
    "llama": (
        transformers.LlamaConfig(**RMS, tie_word_embeddings=False),
        FIELDS | {"rope.dimension_count": 16},
    ),
    "qwen2": (transformers.Qwen2Config(**RMS), FIELDS),
    "qwen3": (
        transformers.Qwen3Config(**RMS, head_dim=32),
        FIELDS | {"attention.key_length": 32, "attention.value_length": 32},
    ),
    "gemma2": (
        transformers.Gemma2Config(**RMS, head_dim=32, query_pre_attn_scalar=32, sliding_window=16),
        FIELDS
        | {"attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 16}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "phi3": (
        transformers.Phi3Config(**RMS, tie_word_embeddings=False, original_max_position_embeddings=128),
        FIELDS
        | {"rope.dimension_count": 16, "attention.sliding_window": 0}
        | {"rope.scaling.original_context_length": 128},
    ),
    "nemotron": (
        transformers.NemotronConfig(**SIZES, partial_rotary_factor=0.5),
        {key: value for key, value in FIELDS.items() if "rms" not in key}
        | {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 8},
    ),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=48, n_positions=128, n_embd=64, n_layer=2, n_head=4, n_inner=256, pad_token_id=0
        ),
        GPT2,
    ),
}


def keys_of(architecture, names):
    """Those of llama.cpp for tensors of a checkpoint."""
    known = ARCHITECTURES[architecture]
    stems = [*known.top, *(f"blk.{n}.{stem}" for n in range(2) for stem in known.layer)]
    keys = [f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")]
    found = {name: key for key in keys for name in known.names(key, 0)}
    return {name: found[name] for name in names}


def is_transposed(architecture, key):
    """Whether transformers has the matrix [K, N]."""
    return architecture == "gpt2" and key.startswith("blk.") and key.endswith(".weight") and "norm" not in key


@pytest.mark.parametrize("architecture", CASES)
def test_against_transformers(tmp_path, architecture):
    config, fields = CASES[architecture]
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = {}
    for name, key in keys_of(architecture, state).items():
        shape = state[name].mT.shape if is_transposed(architecture, key) else state[name].shape
        tensors[key] = np.random.default_rng(len(tensors)).standard_normal(shape, np.float32)
    pad = ("tokenizer.ggml.padding_token_id", 0)
    path = write(tmp_path / "model.gguf", tensors, architecture, fields, [pad])
    expected = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    found = open_gguf(path)
    assert found.tensors.keys() == state.keys()
    for name, tensor in found.tensors.items():
        value = tensor.read()
        assert value.shape == tensor.shape
        value = value.mT if is_transposed(architecture, tensor.key) else value
        assert same_bits(value, expected[name]), name
    assert found.config["architectures"] == [type(model).__name__]
    config.architectures = found.config["architectures"]
    theirs, ours = config.to_dict(), type(config)(**found.config).to_dict()
    assert {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]} == {}


def opened(tmp_path, tensors, fields=LLAMA, **options):
    return open_gguf(write(tmp_path / "model.gguf", tensors, fields=fields, **options))


def test_factors_of_llama_3(tmp_path):
    """They make the frequencies that transformers computes."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    options = dict(theta=5e5, max_position_embeddings=128)
    truth, _ = ops.rope_frequencies(64, scaling, **options)
    plain, _ = ops.rope_frequencies(64, None, **options)
    factors = (plain / truth).float().numpy()
    config = opened(tmp_path, {"rope_freqs.weight": factors}).config
    for length in (None, 1000):
        found, factor = ops.rope_frequencies(64, config["rope_scaling"], **options, sequence_length=length)
        torch.testing.assert_close(found, truth, rtol=1e-6, atol=0)
        assert factor == 1
    transformers.LlamaConfig(**config)


def test_rope_scaling(tmp_path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = opened(tmp_path, {}, LLAMA | linear).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
        "rope.scaling.yarn_beta_fast": 16.0,
    }
    config = opened(tmp_path, {}, LLAMA | yarn).config
    assert config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
    }
    assert "rope_scaling" not in opened(tmp_path, {}, LLAMA | {"rope.scaling.type": "none"}).config


def test_longrope(tmp_path):
    short, long = np.linspace(1, 2, 8, dtype=np.float32), np.linspace(1, 60, 8, dtype=np.float32)
    tensors = {"rope_factors_short.weight": short, "rope_factors_long.weight": long}
    fields = LLAMA | {"rope.scaling.original_context_length": 32, "rope.scaling.attn_factor": 1.25}
    fields |= {"rope.dimension_count": 16, "attention.sliding_window": 7}
    found = open_gguf(write(tmp_path / "phi.gguf", tensors, "phi3", fields))
    assert found.tensors == {}
    assert found.config["rope_scaling"] == {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "attention_factor": 1.25,
        "original_max_position_embeddings": 32,
    }
    assert found.config["original_max_position_embeddings"] == 32
    assert (found.config["partial_rotary_factor"], found.config["sliding_window"]) == (1.0, 7)


def test_experts_of_mixtral(tmp_path):
    stacks = {name: quantized((3, 64, 64), Type.Q8_0) for name in ("gate", "up", "down")}
    tensors = {f"blk.0.ffn_{name}_exps.weight": stack for name, stack in stacks.items()}
    tensors["blk.0.ffn_gate_inp.weight"] = np.ones((3, 64), np.float32)
    found = opened(tmp_path, tensors, LLAMA | {"expert_count": 3, "expert_used_count": 2})
    assert found.config["model_type"] == "mixtral"
    assert (found.config["num_local_experts"], found.config["num_experts_per_tok"]) == (3, 2)
    moe = "model.layers.0.block_sparse_moe"
    parts = [f"{moe}.experts.{e}.{w}.weight" for e in range(3) for w in ("w1", "w2", "w3")]
    assert found.tensors.keys() == {f"{moe}.gate.weight", *parts}
    rows, _ = stacks["down"]
    value = found.tensors[f"{moe}.experts.2.w2.weight"].read()
    scales, codes = rows[2, 5, :2].view(np.float16).item(), rows[2, 5, 2:34].view(np.int8)
    assert (dequantize(value)[5, :32].numpy() == codes * np.float32(scales)).all()


def test_biases_of_llama(tmp_path):
    bias = np.arange(64, dtype=np.float32)
    found = opened(tmp_path, {"blk.0.attn_q.bias": bias})
    assert found.config["attention_bias"]
    order = torch.tensor(bias).view(4, 8, 2).mT.flatten()
    assert torch.equal(found.tensors["model.layers.0.self_attn.q_proj.bias"].read(), order)


def test_bert(tmp_path):
    """Which transformers does not read."""
    model = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=48,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    )
    state = model.state_dict()
    tensors = {key: state[name].numpy() for name, key in keys_of("bert", state).items()}
    fields = GPT2 | {"context_length": 32, "feed_forward_length": 96, "attention.layer_norm_epsilon": 1e-12}
    found = open_gguf(write(tmp_path / "bert.gguf", tensors, "bert", fields))
    built = transformers.BertConfig(**found.config)
    known = model.config.to_dict() | {"architectures": ["BertModel"]}
    assert all(getattr(built, key) == known[key] for key in found.config)
    assert found.tensors.keys() == state.keys()
    assert all(same_bits(found.tensors[name].read(), value) for name, value in state.items())


def test_tokens_and_unknown_tensors(tmp_path):
    others = [("tokenizer.ggml.bos_token_id", 1), ("tokenizer.ggml.eos_token_id", 2)]
    found = opened(tmp_path, {"blk.0.new.weight": np.ones(3, np.float32)}, others=others)
    assert (found.config["bos_token_id"], found.config["eos_token_id"]) == (1, 2)
    assert [*found.tensors] == ["blk.0.new.weight"]
