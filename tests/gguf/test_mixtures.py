"""gpt-oss and DeepSeek-V2, whose tensors llama.cpp cuts and turns, and checkpoints of several files."""

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import warpformer as wf
from tests.gguf.files import write
from tests.gguf.test_load import checkpoint
from tests.models.checkpoints import DEEPSEEK, GROUPED, YARN, padded_batch, positions, random_model, same

GPT_OSS = transformers.GptOssConfig(
    **GROUPED | dict(hidden_size=64, intermediate_size=96),
    head_dim=16,
    sliding_window=6,
    num_local_experts=5,
    num_experts_per_tok=3,
    rope_parameters=YARN | {"truncate": False},
)
MLA = DEEPSEEK | dict(hidden_size=64, max_position_embeddings=128)
LITE = transformers.DeepseekV2Config(**MLA, q_lora_rank=None)
FULL = transformers.DeepseekV2Config(
    **MLA,
    q_lora_rank=24,
    topk_method="group_limited_greedy",
    n_group=3,
    topk_group=2,
    routed_scaling_factor=2.5,
    rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
)
SHARED = {  # of a layer -> llama.cpp's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.router": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def fields(config, **others):
    rope = config.rope_parameters
    found = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "expert_used_count": config.num_experts_per_tok,
    }
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    return found | others


def converted(config, state, norms, pieces):
    """The tensors of a file: `pieces` are those that are cut or turned, (layer, name, value) -> some."""
    tensors = {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition(".")
        if stem in TOP:
            tensors[f"{TOP[stem]}.{leaf}"] = value.numpy()
            continue
        layer, _, module = stem.removeprefix("model.layers.").partition(".")
        known = SHARED | norms
        if module in known:
            tensors[f"blk.{layer}.{known[module]}.{leaf}"] = value.numpy()
            continue
        for key, piece in pieces(f"{module}.{leaf}", value).items():
            tensors[f"blk.{layer}.{key}"] = piece.contiguous().numpy()
    return tensors


def pieces_of_gpt_oss(name, value):
    leaf = name.rpartition(".")[-1]
    value = value.mT if leaf in ("gate_up_proj", "down_proj") else value
    if leaf.startswith("gate_up_proj"):
        end = "bias" if leaf.endswith("bias") else "weight"
        return {f"ffn_gate_exps.{end}": value[:, ::2], f"ffn_up_exps.{end}": value[:, 1::2]}
    names = {
        "sinks": "attn_sinks.weight",
        "down_proj": "ffn_down_exps.weight",
        "down_proj_bias": "ffn_down_exps.bias",
    }
    return {names[leaf]: value}


def pieces_of_deepseek(name, value, absorbed):
    if name == "mlp.experts.gate_up_proj":
        gate, up = value.chunk(2, 1)
        return {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
    if name == "mlp.experts.down_proj":
        return {"ffn_down_exps.weight": value}
    assert name == "self_attn.kv_b_proj.weight"
    if not absorbed:
        return {"attn_kv_b.weight": value}
    keys, values = value.unflatten(0, (LITE.num_attention_heads, -1)).split([16, 12], 1)
    return {"attn_k_b.weight": keys.mT, "attn_v_b.weight": values}


def equal(path, theirs):
    ids, mask = padded_batch()
    kept = mask.bool()
    logits = theirs(ids, attention_mask=mask, position_ids=positions(mask)).logits
    same(wf.load(path)(ids, mask)[kept], logits[kept], 2e-4)


@pytest.mark.parametrize("kind", [None, GGMLQuantizationType.MXFP4, GGMLQuantizationType.Q8_0])
@torch.no_grad()
def test_gpt_oss(tmp_path, kind):
    theirs = random_model(transformers.GptOssForCausalLM, GPT_OSS)
    state = theirs.state_dict()
    if kind is not None:
        for name, value in state.items():
            if name.endswith(("gate_up_proj", "down_proj")):
                rounded = dequantize(quantize(value.mT.contiguous().numpy(), kind), kind)
                value.copy_(torch.from_numpy(rounded).mT)
    tensors = converted(
        GPT_OSS, state, {"post_attention_layernorm": "post_attention_norm"}, pieces_of_gpt_oss
    )
    if kind is not None:
        for key, value in tensors.items():
            if key.endswith("exps.weight"):
                tensors[key] = quantize(value, kind), kind
    own = {
        "expert_count": 5,
        "expert_feed_forward_length": 96,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.sliding_window": 6,
    }
    equal(write(tmp_path / "model.gguf", tensors, "gpt-oss", fields(GPT_OSS, **own)), theirs)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("config", [LITE, FULL], ids=["lite", "full"])
@torch.no_grad()
def test_deepseek_v2(tmp_path, config, absorbed):
    theirs = random_model(transformers.DeepseekV2ForCausalLM, config)
    norms = {"post_attention_layernorm": "ffn_norm"}
    tensors = converted(
        config, theirs.state_dict(), norms, lambda name, value: pieces_of_deepseek(name, value, absorbed)
    )
    own = {
        "attention.kv_lora_rank": 32,
        "rope.dimension_count": 8,
        "leading_dense_block_count": 1,
        "expert_feed_forward_length": 20,
        "expert_count": 6,
        "expert_shared_count": 2,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_gating_func": 1,
    }
    if absorbed:
        own |= {"attention.key_length": 40, "attention.value_length": 32, "attention.head_count_kv": 1}
        own |= {"attention.key_length_mla": 24, "attention.value_length_mla": 12}
    else:
        own |= {"attention.key_length": 24, "attention.value_length": 12}
    if config is FULL:
        own |= {"attention.q_lora_rank": 24, "expert_group_count": 3, "expert_group_used_count": 2}
        own |= {"rope.scaling.yarn_log_multiplier": 0.0707}
    equal(write(tmp_path / "model.gguf", tensors, "deepseek2", fields(config, **own)), theirs)


def test_deepseek_v3_is_refused(tmp_path):
    own = {"expert_gating_func": 2, "expert_count": 6, "attention.kv_lora_rank": 32}
    tensors = {"token_embd.weight": np.ones((97, 64), np.float32)}
    path = write(tmp_path / "model.gguf", tensors, "deepseek2", fields(LITE, **own))
    with pytest.raises(wf.CheckpointError, match="scoring_func = 'sigmoid'"):
        wf.load(path)


def test_pieces_that_do_not_fit(tmp_path):
    names = ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight")
    tensors = {name: np.ones((5, 8, 8 * n), np.float32) for n, name in enumerate(names, 1)}
    path = write(tmp_path / "model.gguf", tensors, "gpt-oss", fields(GPT_OSS))
    with pytest.raises(wf.CheckpointError, match=r"of \[5, 8, 8\] and \[5, 8, 16\] do not fit each other"):
        wf.load(path)


@pytest.fixture
def parts(tmp_path):
    """A checkpoint whole, and the same in several files."""
    whole, _ = checkpoint(tmp_path / "whole.gguf", None)
    source = wf.gguf.open_gguf(whole)
    writer = GGUFWriter(tmp_path / "cut.gguf", "llama", split_max_tensors=8)
    for key, value in source.metadata.items():
        if key.startswith("llama."):
            (writer.add_uint32 if type(value) is int else writer.add_float32)(key, value)
    for tensor in source.tensors.values():
        writer.add_tensor(tensor.key, np.asarray(tensor._data).view(np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole, sorted(tmp_path.glob("cut-*.gguf"))


@torch.no_grad()
def test_several_files(parts):
    whole, files = parts
    assert [file.name for file in files] == [f"cut-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    ids, mask = padded_batch()
    expected = wf.load(whole)(ids, mask)
    for file in (files[0], files[2]):
        assert torch.equal(wf.load(file)(ids, mask), expected)


def test_several_files_that_are_none(parts):
    _, (first, second, third) = parts
    third.rename(third.with_name("third"))
    with pytest.raises(FileNotFoundError, match=r"cut-00003-of-00003\.gguf is missing"):
        wf.load(first)
    third.write_bytes(second.read_bytes())
    with pytest.raises(wf.CheckpointError, match=r"cut-00003-of-00003\.gguf: it is not part 2 of 3 files"):
        wf.load(first)
    first.rename(first.with_name("first.gguf"))
    with pytest.raises(wf.CheckpointError, match="it is one of 3 files, and not named"):
        wf.load(first.with_name("first.gguf"))
