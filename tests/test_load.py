"""Checkpoints come from outside: whatever is wrong with one, the error says it, and nothing is allocated."""

import json
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import warpformer as wf

from .models.test_bert import SIZES, batch


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_missing_files(folder):
    with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
        wf.load(folder / "nothing" / "here")
    with pytest.raises(wf.CheckpointError, match=r"config\.json is a file"):
        wf.load(folder / "config.json")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing .*never read"):
        wf.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        wf.load(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1, 2]", "JSON list, not a dict"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not JSON"),
        ("{}", "model_type = None is none of"),
    ],
)
def test_damaged_config(folder, text, message):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(wf.CheckpointError, match=message):
        wf.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "perceiver"}, r"'perceiver' is none of \['bart', "),
        ({"model_type": "../bert"}, "is none of"),
        ({"model_type": ["bert"]}, "is none of"),
        ({"hidden_size": 50}, "hidden_size = 50 is no multiple of num_attention_heads = 4"),
        ({"hidden_size": -48}, "hidden_size = -48 is not in 1"),
        ({"hidden_size": 0}, "hidden_size = 0 is not in 1"),
        ({"hidden_size": 1 << 70}, "hidden_size = .* is not in 1"),
        ({"hidden_size": "48"}, "hidden_size = '48' is not of type int"),
        ({"hidden_size": True}, "hidden_size = True is not of type int"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000 is over 1024"),
        ({"num_hidden_layers": 3}, r"'layers\.2\.attention\.qkv\.query\.weight' is missing; .* and 8 more"),
        ({"vocab_size": 10**7}, r"shape \[97, 48\], but config.json makes it \[10000000, 48\]"),
        ({"intermediate_size": 81}, r"shape \[80, 48\], but config.json makes it \[81, 48\]"),
        ({"hidden_act": "swoosh"}, "hidden_act = 'swoosh' is none of"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps = nan is not finite"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_impossible_config(folder, changes, message):
    edit(folder / "config.json", **changes)
    with pytest.raises(wf.CheckpointError, match=message):
        wf.load(folder)


def test_config_without_a_size(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["hidden_size"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(wf.CheckpointError, match=r"config\.json has no hidden_size"):
        wf.load(folder)


def lying(change):
    def rewrite(data):
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return rewrite


def tensor(header):
    return header["embeddings.word_embeddings.weight"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: struct.pack("<Q", 1 << 63) + data[8:],
        lambda data: struct.pack("<Q", 10**9) + data[8:],
        lambda data: data[:8] + b"\x00" * 50 + data[58:],
        lying(lambda header: tensor(header).update(shape=[97, 49])),
        lying(lambda header: tensor(header).update(shape=[1 << 40, 1 << 40])),
        lying(lambda header: tensor(header).update(data_offsets=[0, 1 << 50])),
        lying(lambda header: tensor(header).update(data_offsets=[-4, 97 * 48 * 4])),
        lying(lambda header: tensor(header).update(dtype="F99")),
    ],
)
def test_damaged_weights(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(wf.CheckpointError, match=r"model\.safetensors is damaged"):
        wf.load(folder)


def test_tensor_of_another_dtype(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["pooler.dense.weight"] = state["pooler.dense.weight"].double()
    save_file(state, path)
    with pytest.raises(wf.CheckpointError, match=r"'pooler\.dense\.weight' has dtype F64, not float32 or"):
        wf.load(folder)


def test_unknown_tensor_is_logged(folder, caplog):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"something.else": torch.zeros(1)}, path)
    wf.load(folder)
    assert "'something.else' of the checkpoint is not part of the model" in caplog.text


def shard(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_checkpoint(folder):
    expected = wf.load(folder)(*batch()).last_hidden_state
    shard(folder)
    assert torch.equal(wf.load(folder)(*batch()).last_hidden_state, expected)
    (folder / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing"):
        wf.load(folder)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "x/../a.safetensors"])
def test_index_that_points_outside(folder, name):
    shard(folder)
    edit(folder / "model.safetensors.index.json", weight_map={"a": name})
    with pytest.raises(wf.CheckpointError, match="names files outside its folder"):
        wf.load(folder)


def test_index_without_a_map(folder):
    shard(folder)
    edit(folder / "model.safetensors.index.json", weight_map=[1])
    with pytest.raises(wf.CheckpointError, match="has no weight_map"):
        wf.load(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_dtype(folder, dtype):
    path = folder / "model.safetensors"
    save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    assert wf.load(folder, dtype=dtype)(*batch()).last_hidden_state.dtype == (dtype or torch.bfloat16)


@pytest.mark.parametrize(
    "quantization", ["int8_dynamic", {"mode": "int4", "group_size": 32, "clip": "mse", "skip": "pooler"}]
)
def test_quantization(folder, quantization):
    options = {"mode": quantization} if isinstance(quantization, str) else quantization
    model = wf.load(folder)
    wf.quantize_(model, **options)
    found = wf.load(folder, quantization=quantization)
    state = found.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(found(*batch()).last_hidden_state, model(*batch()).last_hidden_state)
    assert not any(p.requires_grad for p in found.parameters())
    assert not any(module.training for module in found.modules())


def test_quantization_reads_the_weights_as_they_are_stored(folder):
    found = wf.load(folder, dtype=torch.bfloat16, quantization="int8").state_dict()
    for key, value in wf.load(folder, quantization="int8").state_dict().items():
        kept = key.endswith(("qweight", "scales"))
        assert torch.equal(found[key], value if kept else value.bfloat16()), key


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("int7", "mode = 'int7' is none of"),
        ({"mode": "int4", "group_size": 31}, r"layers\.0\.attention\.qkv: group_size = 31"),
        ({"mode": "int4", "clip": 3}, "clip = 3"),
    ],
)
def test_unknown_quantization(folder, quantization, message):
    with pytest.raises(wf.InputError, match=message):
        wf.load(folder, quantization=quantization)
    with pytest.raises(TypeError):
        wf.load(folder, quantization={"mode": "int4", "size": 3})


def test_quantization_of_a_damaged_weight(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["encoder.layer.1.output.dense.weight"][0, 0] = torch.nan
    save_file(state, path)
    with pytest.raises(wf.CheckpointError, match=r"layers\.1\.feed_forward\.down: .* has NaN or Inf"):
        wf.load(folder, quantization="int8")
