"""Models of GGUF files: what llama.cpp's types stand for, computed as transformers computes it."""

import numpy as np
import pytest
import torch
import transformers
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

import warpformer as wf
from tests.gguf.files import LLAMA, write
from tests.gguf.test_architectures import keys_of
from tests.models.checkpoints import padded_batch, positions, same

Q4_0, Q8_0 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
FIELDS = LLAMA | {"block_count": 2, "vocab_size": 97}


def checkpoint(path, kind):
    """A file with matrices of a type, and transformers' model of the numbers that they stand for."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state, tensors = model.state_dict(), {}
    for name, key in keys_of("llama", state).items():
        values = state[name]
        if key.split(".")[-2] in ("attn_q", "attn_k"):  # as llama.cpp's rope takes them
            heads = 4 if "attn_q" in key else 2
            values = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        values = values.numpy()
        if kind is None or values.ndim == 1:
            tensors[key] = values
            continue
        rows = quantize(values, kind)
        tensors[key] = rows, kind
        rounded = torch.from_numpy(np.array(dequantize(rows, kind)))
        if key.split(".")[-2] in ("attn_q", "attn_k"):
            rounded = rounded.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        state[name].copy_(rounded)
    return write(path, tensors, "llama", FIELDS), model


@pytest.mark.parametrize("kind", [None, Q4_0, Q8_0, GGMLQuantizationType.Q5_0])
@torch.no_grad()
def test_logits(tmp_path, kind):
    path, theirs = checkpoint(tmp_path / "model.gguf", kind)
    model = wf.load(path)
    layer = model.backbone.layers[0].feed_forward.down
    expected = {Q4_0: ("int4", 32), Q8_0: ("int8", 32)}.get(kind)
    assert expected is None or (layer.format, layer.group_size) == expected
    ids, mask = padded_batch()
    kept = mask.bool()
    logits = theirs(ids, attention_mask=mask, position_ids=positions(mask)).logits
    same(model(ids, mask)[kept], logits[kept], 2e-4)
    same(wf.load(path, trainable=True)(ids, mask)[kept], logits[kept], 2e-4)
    assert wf.load(path, dtype=torch.bfloat16)(ids, mask).dtype == torch.bfloat16


@torch.no_grad()
def test_saved_again(tmp_path):
    model = wf.load(checkpoint(tmp_path / "model.gguf", Q4_0)[0])
    wf.save(model, tmp_path / "saved")
    ids, mask = padded_batch()
    assert torch.equal(wf.load(tmp_path / "saved")(ids, mask), model(ids, mask))
    again = wf.load(tmp_path / "model.gguf", quantization="int8")
    assert again.backbone.layers[0].attention.out.format == "int8"
