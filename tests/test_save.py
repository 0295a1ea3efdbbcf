"""A quantized checkpoint is read as it was written, or, since it comes from outside, refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import warpformer as wf
from tests.check import same_bits
from warpformer.models import bert

from .models.test_bert import SIZES, batch

MODES = [
    ("int8", {}),
    ("int8", {"group_size": 32}),
    ("int8_dynamic", {}),
    ("int4", {"group_size": 32, "zero_points": True}),
    ("int4_dynamic", {}),
    ("nf4", {"group_size": -1}),
]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "float"
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(folder, tmp_path):
    """A checkpoint of int4, but for the pooler in int8 and the first layer's `up`."""
    model = wf.load(folder)
    wf.quantize_(model, "int4", 32, zero_points=True, skip=["pooler", "layers.0.feed_forward.up"])
    wf.quantize_(model, "int8", skip="layers.0.feed_forward.up")
    wf.save(model, tmp_path / "quantized")
    return tmp_path / "quantized"


def same_outputs(a, b):
    a, b = a(*batch()), b(*batch())
    return same_bits(a.last_hidden_state, b.last_hidden_state) and same_bits(a.pooler_output, b.pooler_output)


@pytest.mark.parametrize(("mode", "options"), MODES)
def test_round_trip(folder, tmp_path, mode, options):
    model = wf.load(folder)
    wf.quantize_(model, mode, **options)
    wf.save(model, tmp_path / "out")
    again = wf.load(tmp_path / "out")
    assert same_outputs(model, again)
    assert again.config == model.config
    state = again.state_dict()
    assert all(same_bits(value, state[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in again.parameters())


def test_float_round_trip(folder, tmp_path):
    for dtype in (None, torch.bfloat16):
        model = wf.load(folder, dtype=dtype)
        wf.save(model, tmp_path / "out")
        assert same_outputs(model, wf.load(tmp_path / "out"))
    theirs = transformers.BertModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).state_dict()
    assert all(same_bits(value, theirs[bert.KEYS.theirs(key)]) for key, value in model.state_dict().items())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_several_formats_in_a_model(quantized):
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "warpformer"
    assert [(g["format"], g["group_size"], g["zero_points"]) for g in config["groups"]] == [
        ("int4", 32, True),
        ("int8", -1, False),
    ]
    assert config["groups"][1]["layers"] == ["pooler"]
    model = wf.load(quantized)
    assert type(model.layers[0].feed_forward.up) is wf.nn.PackedLinear
    assert type(model.pooler) is wf.nn.Int8Linear
    assert "encoder.layer.1.attention.self.query.qweight" in load_file(quantized / "model.safetensors")


def test_dtype_is_that_of_activations(quantized):
    model = wf.load(quantized, dtype=torch.bfloat16)
    assert model(*batch()).last_hidden_state.dtype == torch.bfloat16
    before, after = wf.load(quantized).state_dict(), model.state_dict()
    for key, value in before.items():
        kept = key.endswith(("qweight", "scales", "zeros"))
        assert same_bits(after[key], value if kept else value.bfloat16()), key


def test_a_quantized_checkpoint_is_not_quantized_again(quantized):
    with pytest.raises(wf.InputError, match="'int8', but the checkpoint is quantized already"):
        wf.load(quantized, quantization="int8")


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values["quantization_config"])
    path.write_text(json.dumps(values))


def group(**values):
    return lambda config: config["groups"][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(quant_method="gptq"), "quant_method = 'gptq' is not 'warpformer'"),
        (lambda config: config.clear(), "quant_method = None"),
        (lambda config: config.update(groups={}), "no list of groups"),
        (lambda config: config.update(groups=[3]), "no list of groups"),
        (lambda config: config["groups"][0].pop("format"), "format = None is no str"),
        (lambda config: config["groups"][0].pop("layers"), "layers = None is no list"),
        (group(format="int3"), "format = 'int3' is none of"),
        (group(format=["int4"]), r"format = \['int4'\] is no str"),
        (group(format="int8"), "zero_points: int8 is symmetric"),
        (group(format="int8_dynamic", zero_points=False), "group_size = 32 of int8_dynamic"),
        (group(format="nf4"), "zero_points: nf4 is symmetric"),
        (group(group_size="32"), "group_size = '32' is no int"),
        (group(group_size=True), "group_size = True is no int"),
        (group(group_size=0), "group_size = 0 of int4"),
        (group(group_size=31), "group_size = 31 of int4"),
        (group(group_size=1 << 70), "group_size = 1180591620717411303424 of int4"),
        (group(group_size=64), r"scales' has shape \[48, 2\], but config\.json makes it \[48, 1\]"),
        (group(zero_points=1), "zero_points = 1 is no bool"),
        (group(zero_points=False), None),
        (group(layers=["norm"]), "the layer 'norm', which is no linear layer"),
        (group(layers=["nothing.here"]), "the layer 'nothing.here', which is no"),
        (group(layers=[["qkv"]]), "which is no linear layer"),
        (group(layers=["pooler"]), "which is no linear layer"),  # the second group has it too
        (group(layers=[]), r"'layers\.0\.attention\.qkv\.query\.weight' is missing"),
    ],
)
def test_impossible_config(quantized, change, message):
    edit(quantized, change)
    if message is None:  # the zeros are extra tensors then
        wf.load(quantized)
        return
    with pytest.raises(wf.CheckpointError, match=message):
        wf.load(quantized)


@pytest.mark.parametrize("value", [[], "int4", 3])
def test_quantization_config_that_is_no_object(quantized, value):
    path = quantized / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))
    with pytest.raises(wf.CheckpointError, match="quant_method = None"):
        wf.load(quantized)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("qweight", lambda t: t.to(torch.int8), "has dtype int8, not uint8"),
        (
            "qweight",
            lambda t: t[:, 1:].contiguous(),
            r"has shape \[48, 23\], but config\.json makes it \[48, 24\]",
        ),
        ("scales", lambda t: t.double(), "has dtype F64, not float32 or bfloat16 or float16"),
        ("scales", lambda t: t / 0, r"layers\.1\.attention\.out: .*NaN or Inf"),
        ("zeros", lambda t: t + 16, "values above 15"),
        ("zeros", lambda t: t.int(), "has dtype I32, not uint8"),
    ],
)
def test_damaged_tensors(quantized, key, change, message):
    path = quantized / "model.safetensors"
    state = load_file(path)
    key = f"encoder.layer.1.attention.output.dense.{key}"
    save_file(state | {key: change(state[key])}, path)
    with pytest.raises(wf.CheckpointError, match=message):
        wf.load(quantized)


def test_save_refuses(folder, tmp_path):
    with pytest.raises(TypeError, match=r"must be of warpformer\.models, not Linear"):
        wf.save(torch.nn.Linear(2, 2), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(FileExistsError, match="index"):
        wf.save(wf.load(folder), tmp_path)


def test_saving_over_the_checkpoint_it_came_from(folder):
    model = wf.load(folder)
    wf.quantize_(model, "int8")
    wf.save(model, folder)
    assert same_outputs(model, wf.load(folder))
    assert not [*folder.glob("*.partial")]
