import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import warpformer as wf
from tests.training.trainers import (
    make_model,
    make_objective,
    make_trainer,
    read_log,
    weights,
    write_config,
)
from warpformer.training import Trainer

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
STEPS = 60


def start(config, out, *options):
    """`warpformer train` in a process of its own. One thread: neighbours of this test would stall more."""
    command = [sys.executable, "-m", "warpformer", "train", str(config), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(process, expected=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == expected, err
    return out + err


def wait_for_step(process, out, step):
    while process.poll() is None:
        path = out / "log.csv"
        if path.exists() and path.read_text().count("\n") > step:
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[1])


@pytest.fixture(scope="module")
def config(pairs, tmp_path_factory):
    return write_config(
        tmp_path_factory.mktemp("run"), pairs, max_steps=STEPS, accumulate=2, autocast='"bfloat16"',
        eval_every=15, save_every=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """A run that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(start(config, out))
    return out


def assert_same(out, whole):
    assert read_log(out) == read_log(whole)
    for name in (f"checkpoint-{STEPS}/{FILES[0]}", f"checkpoint-{STEPS}/{FILES[1]}", "model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_killed_and_resumed(config, whole, tmp_path):
    """At a random moment, twice, with dropout, accumulation and autocast: the same bits."""
    out = tmp_path / "out"
    for number, step in enumerate((random.randrange(1, 25), random.randrange(30, 55))):
        process = start(config, out, *["--resume"] * number)
        wait_for_step(process, out, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached = int(read_log(out, ["step"])[-2][0])
        found = [int(path.name.split("-")[1]) for path in out.glob("checkpoint-*[0-9]")]
        assert max(found, default=0) >= reached - reached % 10 - 10  # one may just be written
    said = finish(start(config, out, "--resume"))
    assert f"after step {max(found)}" in said
    assert_same(out, whole)
    loaded = wf.load(out)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_terminated_and_resumed(config, whole, tmp_path):
    out = tmp_path / "out"
    process = start(config, out)
    wait_for_step(process, out, 17)
    process.terminate()
    said = finish(process, 128 + signal.SIGTERM)
    assert f"to go on: warpformer train {config} --out {out} --resume" in said
    step = int(read_log(out, ["step"])[-1][0])
    assert (out / f"checkpoint-{step}").is_dir()
    finish(start(config, out, "--resume"))
    assert_same(out, whole)


def stopped_at_4(pairs, tokenizer, out, **options):
    make_trainer(pairs, tokenizer, out, **dict(max_steps=4, save_every=2) | options).train()
    return out / "checkpoint-4"


def test_more_steps(pairs, tokenizer, tmp_path):
    stopped_at_4(pairs, tokenizer, tmp_path / "out")
    trainer = make_trainer(pairs, tokenizer, tmp_path / "out", max_steps=6)
    assert trainer.resume() == 4
    trainer.train()
    make_trainer(pairs, tokenizer, tmp_path / "whole", max_steps=6).train()
    assert read_log(tmp_path / "out") == read_log(tmp_path / "whole")
    assert all(
        (tmp_path / "out/checkpoint-6" / name).read_bytes()
        == (tmp_path / "whole/checkpoint-6" / name).read_bytes()
        for name in FILES[:2]
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["half", "empty", "missing", "changed"])
def test_damage_is_named(pairs, tokenizer, tmp_path, name, damage):
    path = stopped_at_4(pairs, tokenizer, tmp_path) / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        changed = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
        path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "changed": changed}[damage])
    trainer = make_trainer(pairs, tokenizer, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    if (name, damage) == ("state.json", "changed"):  # a digit of a digest
        path.write_bytes(data.replace(b'"sha256": "', b'"sha256": "0', 1))
    with pytest.raises(wf.CheckpointError, match=r"checkpoint-4/(model|optimizer|state)\.") as error:
        trainer.resume()
    assert str(path) in str(error.value) or (name, damage) == ("state.json", "changed")
    assert all((value == before[name]).all() for name, value in trainer.model.named_parameters())
    assert not trainer.optimizer.state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("files"), "says nothing of model.safetensors"),
        (lambda state: state.pop("identity"), "has no identity"),
        (lambda state: state["progress"].pop("epoch"), "progress has not the fields"),
        (lambda state: state["progress"].update(step="4"), "progress.step = '4' is no int"),
    ],
)
def test_state_that_is_not_one(pairs, tokenizer, tmp_path, change, message):
    path = stopped_at_4(pairs, tokenizer, tmp_path) / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    with pytest.raises(wf.CheckpointError, match=f"state.json.* {message}"):
        make_trainer(pairs, tokenizer, tmp_path).resume()


def test_a_checkpoint_of_something_else(pairs, tokenizer, tmp_path):
    stopped_at_4(pairs, tokenizer, tmp_path)
    with pytest.raises(wf.CheckpointError, match=r"learning_rate = 0\.001 there, 0\.5 here"):
        make_trainer(pairs, tokenizer, tmp_path, learning_rate=0.5).resume()
    other = make_objective(pairs, tokenizer, range(100, 300))
    trainer = make_trainer(pairs, tokenizer, tmp_path)
    trainer = Trainer(trainer.model, other, trainer.config, tmp_path)
    with pytest.raises(wf.CheckpointError, match=r"state.json is of another run: data.train"):
        trainer.resume()
    for options, message in [
        (
            dict(encoder_ffn_dim=64),
            r"'backbone.encoder.layers.0.feed_forward.up.weight' has shape \[48, 32\]",
        ),
        (dict(decoder_layers=2), r"'backbone.decoder.layers.1.\S+' is missing"),
    ]:
        model = make_model(make_objective(pairs, tokenizer), tokenizer, **options)
        with pytest.raises(wf.CheckpointError, match=f"model.safetensors is of another model: {message}"):
            make_trainer(pairs, tokenizer, tmp_path, model=model).resume()


def test_a_checkpoint_is_whole_or_not_there(pairs, tokenizer, tmp_path, monkeypatch):
    """What is there before stays until the new one is on the disk, and partial ones are swept away."""
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=8, save_every=2)
    kept, rename = [], os.rename

    def record(source, target):
        kept.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        if len(kept) == 4:  # that of step 6, after two and the one that removed the first
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", record)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.undo()
    assert kept[:3] == [
        ["checkpoint-2.partial"],
        ["checkpoint-2", "checkpoint-4.partial"],
        ["checkpoint-2", "checkpoint-4", "checkpoint-6.partial"],
    ]
    assert kept[3] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=8, save_every=2)
    (tmp_path / "checkpoint-8.partial").mkdir()
    assert trainer.resume() == 6
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert len(weights(tmp_path, 8)) > 10


def test_resume_must_be_said(pairs, tokenizer, tmp_path):
    stopped_at_4(pairs, tokenizer, tmp_path)
    with pytest.raises(FileExistsError, match="has checkpoints"):
        make_trainer(pairs, tokenizer, tmp_path).train()
    assert make_trainer(pairs, tokenizer, tmp_path / "new").resume() == 0


def test_log_without_its_end(pairs, tokenizer, tmp_path):
    """Rows after the checkpoint, the last one torn, come again."""
    stopped_at_4(pairs, tokenizer, tmp_path)
    path = tmp_path / "log.csv"
    whole = path.read_text()
    path.write_text(whole + "5,0,1,1.0,1.0,1.0,1.0,\n6,0,1")
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=4)
    trainer.resume()
    trainer.train()
    assert path.read_text() == whole
    path.write_text("a,b\n1,2\n")
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=4)
    trainer.resume()
    with pytest.raises(wf.CheckpointError, match=r"log.csv is no log of training"):
        trainer.train()
