"""The original checkpoints of gpt-oss hold their experts in MXFP4."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import warpformer as wf
from warpformer.quantization import dequantize_mxfp4

from .checkpoints import padded_batch, positions, random_model, same


@pytest.fixture
def folder(tmp_path):
    """A checkpoint in MXFP4, and transformers' model of its numbers."""
    config = transformers.GptOssConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.1,
        pad_token_id=0,
    )
    model = random_model(transformers.GptOssForCausalLM, config)
    coded = {}
    for name, parameter in model.named_parameters():
        if name.endswith("_proj") and "experts" in name:
            experts, depth, rows = parameter.shape
            blocks = torch.randint(0, 256, (experts, rows, depth // 32, 16), dtype=torch.uint8)
            scales = torch.randint(122, 125, (experts, rows, depth // 32), dtype=torch.uint8)
            parameter.data.copy_(dequantize_mxfp4(blocks, scales).mT)
            coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {key: value for key, value in load_file(path).items() if f"{key}_blocks" not in coded}
    save_file(kept | coded, path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"quantization_config": {"quant_method": "mxfp4"}}))
    return tmp_path, model


@torch.no_grad()
def test_logits(folder):
    folder, theirs = folder
    ids, mask = padded_batch()
    kept = mask.bool()
    expected = theirs(ids, attention_mask=mask, position_ids=positions(mask)).logits[kept]
    same(wf.load(folder, dtype=torch.float32)(ids, mask)[kept], expected, 2e-4)
    quantized = wf.load(folder, quantization={"mode": "int8", "group_size": 32})
    assert quantized.backbone.layers[0].feed_forward.experts.down.format == "int8"


def test_blocks_that_do_not_fit(folder):
    folder, _ = folder
    path = folder / "model.safetensors"
    state = load_file(path)
    key = next(key for key in state if key.endswith("_blocks"))
    save_file(state | {key: state[key][..., :8].contiguous()}, path)
    with pytest.raises(wf.CheckpointError, match="dequantize_mxfp4: blocks"):
        wf.load(folder)
    save_file({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(wf.CheckpointError, match="is missing"):
        wf.load(folder)
