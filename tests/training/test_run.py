import json
import sys

import pytest
import torch
from tokenizers import Tokenizer

import warpformer as wf
from tests.training.trainers import SIZES, losses, write_config
from warpformer import cli
from warpformer.training import run
from warpformer.training.config import TrainConfig


@pytest.fixture
def config(pairs, tmp_path):
    return write_config(tmp_path, pairs, max_steps=3)


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_folder_of_a_run(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["warpformer", "train", str(config)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    out = tmp_path / "out"
    assert "max_steps after step 3" in capsys.readouterr().out
    names = {"checkpoint-3", "config.json", "log.csv", "loss.png", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in out.iterdir()} == names | {"train.json"}
    about = json.loads((out / "train.json").read_text())
    assert about["config"]["train"]["max_steps"] == about["result"]["progress"]["step"] == 3
    assert about["result"]["progress"]["best_loss"] < 10
    values, tokenizer = (
        json.loads((out / "config.json").read_text()),
        Tokenizer.from_file(str(out / "tokenizer.json")),
    )
    assert values["vocab_size"] == tokenizer.get_vocab_size() == 400
    assert values["decoder_start_token_id"] == tokenizer.token_to_id("<s>")
    assert values["d_model"] == SIZES["d_model"]
    model = wf.load(out)
    ids = torch.tensor([tokenizer.encode("the house").ids])
    assert model(ids, decoder_input_ids=ids).shape == (1, ids.shape[1], 400)


LAYER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
BERT = dict(model_type="bert", architectures=["BertForPreTraining"], max_position_embeddings=64)
OBJECTIVES = {
    "causal": LAYER | dict(model_type="llama"),
    "masked-lm": LAYER | BERT,
    "denoising": SIZES | dict(model_type="bart"),
    "span-corruption": dict(model_type="t5", d_model=32, d_ff=48, d_kv=16, num_layers=1, num_heads=2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(config, tmp_path, name):
    settings = run.read_run_config(config)
    settings.data.columns, settings.data.max_length = [0], 64
    settings.tokenizer.sentinels = 40 if name == "span-corruption" else 0
    settings.model, settings.objective = OBJECTIVES[name], {"name": name}
    run.train(settings)
    found = losses(tmp_path / "out")
    assert len(found) == 3
    assert 4 < found[0] < 9  # of 400 tokens: as good as none is log 400 = 6, and the next sentence 0.7
    assert wf.load(tmp_path / "out").config.vocab_size == 400


ERRORS = [
    ("max_steps = 3", "max_stepz = 3", r"\[train\] has no max_stepz; its keys are .*max_steps"),
    ("max_steps = 3", "max_steps = '3'", r"\[train\] max_steps = '3' is not of type int"),
    ("max_steps = 3", "", "one of max_steps, max_epochs and max_minutes must be given"),
    ("max_steps = 3", "max_epochs = 1\nschedule = 'cosine'", "schedule = 'cosine' needs max_steps"),
    ("max_steps = 3", "max_steps = 3\nschedule = 'linear'", "schedule = 'linear' is none of .*inverse_sqrt"),
    ("max_steps = 3", "max_steps = 3\nautocast = 'half'", r"autocast = 'half' is none of \['bfloat16'\]"),
    ("max_steps = 3", "max_steps = 3\nbetas = [1, 2]", "betas = .* are not two numbers"),
    ("max_steps = 3", "max_steps = 3\naccumulate = 0", "accumulate = 0 is not positive"),
    ("[train]", "[train", "is not TOML"),
    ("[train]", "[trains]", r"has no trains; its keys are data, device, model, .*, train"),
    ("vocab_size = 400", "", r"\[tokenizer\] needs one of path and vocab_size"),
    ("max_length = 128", "", r"\[data\] needs max_length"),
    ("columns = [0, 1]", "columns = ['a']", r"\[data\] columns"),
    ('name = "seq2seq"', 'name = "seq"', r"\[objective\] name = 'seq' is none of \['causal'"),
    (
        "label_smoothing = 0.1",
        "smoothing = 0.1",
        r"\[objective\] has no smoothing; its keys are label_smoothing, name",
    ),
    ("label_smoothing = 0.1", "label_smoothing = '1'", r"label_smoothing = '1' is not of type float"),
]
LATER = [
    ("d_model", "d_modul", r"\[model\] has no d_modul; its keys are .*d_model"),
    ('"transformer"', '"transformers"', "model_type = 'transformers' is none of"),
    ("d_model = 32", "d_model = 33", r"\[model\] .*d_model = 33 is no multiple of"),
    ("d_model = 32", "d_model = 32\nvocab_size = 9", "vocab_size = 9 is below the tokenizer's 400"),
    ("d_model = 32", "d_model = 32\npad_token_id = 9", "pad_token_id = 9, but the tokenizer makes it 0"),
    ("max_length = 128", "max_length = 129", "max_length = 129 is above the model's 128"),
    ("columns = [0, 1]", "columns = [0]", "texts of 2 columns"),
    ("columns = [0, 1]", "columns = [0, 7]", "missing column"),
    ('train = "pairs.tsv"', 'train = "pears.tsv"', "pears.tsv"),
    ("vocab_size = 400", 'path = "none.json"', "none.json is missing"),
    ("vocab_size = 400", 'path = "run.toml"', "run.toml is no tokenizer.json"),
]


@pytest.mark.parametrize(("old", "new", "message"), ERRORS + LATER)
def test_errors(config, tmp_path, old, new, message):
    """Before anything is written."""
    with pytest.raises((ValueError, OSError), match=message):
        run.train(run.read_run_config(replaced(config, old, new)))
    assert not (tmp_path / "out").exists()


def test_bad_lines_are_reported(config, tmp_path, caplog):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(path.read_bytes() + b"\n\xff\tx\nalone\n" + b"long " * 200 + b"\tlargo\n")
    run.train(run.read_run_config(config))
    for reason in ("1 lines: empty line", "1 lines: invalid UTF-8", "1 lines: missing column", "longer than"):
        assert reason in caplog.text


def test_a_folder_is_of_one_run(config, pairs, tmp_path):
    settings = run.read_run_config(config)
    with pytest.raises(FileNotFoundError, match=r"train.json is missing"):
        run.train(settings, resume=True)
    run.train(settings)
    with pytest.raises(FileExistsError, match="holds a run"):
        run.train(settings)
    assert run.train(settings, resume=True).progress.step == 3
    other = run.read_run_config(replaced(config, "d_model = 32", "d_model = 64"))
    with pytest.raises(
        wf.CheckpointError, match=r"train.json is of another run: model.d_model = 32 there, 64"
    ):
        run.train(other, resume=True)
    replaced(config, "d_model = 64", "d_model = 32")
    replaced(tmp_path / "pairs.tsv", "the", "a")
    with pytest.raises(wf.CheckpointError, match=r"train.json is of another run: files.train"):
        run.train(run.read_run_config(config), resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    settings.out = str(tmp_path / "full")
    with pytest.raises(FileExistsError, match="is not empty"):
        run.train(settings)


def test_defaults_are_a_configuration():
    assert TrainConfig(max_steps=1).betas == [0.9, 0.98]
