import math
import signal
import sys
from itertools import chain

import pytest
import torch

import warpformer as wf
from tests.training.trainers import losses, make_model, make_objective, make_trainer, read_log, weights
from warpformer.training import DivergedError, TrainConfig, learning_rate
from warpformer.training.log import FIELDS
from warpformer.training.trainer import adamw


def test_schedules():
    rates = [learning_rate("inverse_sqrt", step, 2.0, 100) for step in (1, 50, 100, 400)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 1.0])
    width, warmup = 512, 4000  # equation 3 of the paper
    peak = width**-0.5 * warmup**-0.5
    for step in (1, 3999, 4000, 4001, 100000):
        paper = width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert learning_rate("inverse_sqrt", step, peak, warmup) == pytest.approx(paper, rel=1e-12)
    rates = [learning_rate("cosine", step, 2.0, 10, 110) for step in (5, 10, 60, 110)]
    assert rates == pytest.approx([1.0, 2.0, 1.1, 0.2])
    assert [learning_rate("constant", step, 2.0, 4) for step in (1, 4, 9)] == [0.5, 2.0, 2.0]
    assert learning_rate("constant", 1, 2.0, 0) == learning_rate("inverse_sqrt", 1, 2.0, 0) == 2.0


def test_accumulation_is_one_large_batch(pairs, tokenizer, tmp_path):
    """Micro-batches of unequal numbers of targets, without clipping."""
    model = make_model(make_objective(pairs, tokenizer), tokenizer, dropout=0.0)
    trainer = make_trainer(pairs, tokenizer, tmp_path, model=model, accumulate=3, max_steps=1, clip=0.0)
    micro_batches = trainer.batches.epoch(0)[:3]
    targets = [trainer.objective.batch(indices, 0).targets for indices in micro_batches]
    assert len(set(targets)) > 1
    loss = trainer.objective.loss(model, trainer.objective.batch([*chain(*micro_batches)], 0))
    loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    found = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({name: value.grad.clone() for name, value in model.named_parameters()})
    )
    trainer.train()
    assert losses(tmp_path) == pytest.approx([loss.item()], rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


def test_only_matrices_decay():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = adamw([vector, matrix], TrainConfig(max_steps=1, learning_rate=0.1, weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert matrix.unique().tolist() == pytest.approx([0.95])
    assert vector.tolist() == [1.0, 1.0]


def test_gradients_are_clipped(pairs, tokenizer, tmp_path):
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=2, clip=0.01)
    norms = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.cat([p.grad.flatten() for p in trainer.parameters]).norm().item())
    )
    trainer.train()
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert all(float(norm) > 0.01 for (norm,) in read_log(tmp_path, ["gradient_norm"]))


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_run(pairs, tokenizer, tmp_path, autocast):
    valid = make_objective(pairs, tokenizer, range(200, 260))
    options = dict(learning_rate=3e-3, eval_every=10, save_every=12, max_steps=25, autocast=autocast)
    trainer = make_trainer(pairs, tokenizer, tmp_path, valid=valid, **options)
    result = trainer.train()
    assert result.reason == "max_steps"
    assert result.progress.step == result.progress.best_step == 25
    found = losses(tmp_path)
    assert len(found) == 25
    assert found[-1] < found[0] - 0.5
    evaluated = [
        (int(step), float(loss)) for step, loss in read_log(tmp_path, ["step", "valid_loss"]) if loss
    ]
    assert [step for step, _ in evaluated] == [10, 20, 25]
    assert evaluated[-1][1] == result.progress.best_loss < evaluated[0][1]
    names = {path.name for path in tmp_path.iterdir()}
    saved = {"checkpoint-24", "checkpoint-25", "config.json", "model.safetensors"}
    assert names == saved | {"log.csv", "loss.png"}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    loaded, trained = wf.load(tmp_path), trainer.model.eval()
    batch = valid.batch(range(8), 0)
    with torch.no_grad():
        assert torch.equal(loaded(**batch.inputs), trained(**batch.inputs))


def test_tied_tables_are_saved_once(pairs, tokenizer, tmp_path):
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=1)
    trainer.train()
    assert trainer.model.lm_head.weight is trainer.model.backbone.tokens.weight
    tables = [
        name for name, value in weights(tmp_path, 1).items() if len(value) == tokenizer.get_vocab_size()
    ]
    assert tables == ["backbone.tokens.weight"]


def test_early_stopping_keeps_the_best(pairs, tokenizer, tmp_path):
    """At a learning rate of 0 nothing changes after the first evaluation, so it stays the best."""
    valid, saved = make_objective(pairs, tokenizer, range(20)), []
    trainer = make_trainer(
        pairs, tokenizer, tmp_path, valid=valid, save=lambda model, out: saved.append(trainer.progress.step),
        learning_rate=1e-30, eval_every=2, patience=3, max_steps=100,
    )  # fmt: skip
    result = trainer.train()
    assert (result.reason, result.progress.step, result.progress.best_step) == ("patience", 8, 2)
    assert saved == [2]


def test_limits(pairs, tokenizer, tmp_path):
    trainer = make_trainer(pairs, tokenizer, tmp_path / "epochs", max_steps=None, max_epochs=2, accumulate=4)
    steps = sum(math.ceil(len(trainer.batches.epoch(epoch)) / 4) for epoch in range(2))
    result = trainer.train()
    assert (result.reason, result.progress.step) == ("max_epochs", steps)
    trainer = make_trainer(pairs, tokenizer, tmp_path / "minutes", max_steps=None, max_minutes=1 / 600)
    assert trainer.train().reason == "max_minutes"


def test_frozen_parameters_stay(pairs, tokenizer, tmp_path):
    model = make_model(make_objective(pairs, tokenizer), tokenizer)
    model.backbone.encoder.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    make_trainer(pairs, tokenizer, tmp_path, model=model, max_steps=2).train()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".encoder." not in name}
    assert weights(tmp_path, 2).keys() == changed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_checkpoint(pairs, tokenizer, tmp_path, number):
    trainer = make_trainer(pairs, tokenizer, tmp_path, max_steps=100)
    before = signal.getsignal(number)

    def interrupt(*_):
        if trainer.progress.step == 4:
            signal.raise_signal(number)
            signal.raise_signal(number)  # torchrun passes on what the terminal already gave

    trainer.optimizer.register_step_post_hook(interrupt)
    result = trainer.train()
    assert (result.reason, result.progress.step, result.signal) == ("interrupted", 5, number)
    assert (tmp_path / "checkpoint-5").is_dir()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("save_every", "message", "steps"),
    [(2, "step 4: a parameter is no number any more", 4), (3, "step 5: the loss is nan", 4)],
)
def test_divergence_names_the_step(pairs, tokenizer, tmp_path, save_every, message, steps):
    trainer = make_trainer(pairs, tokenizer, tmp_path, save_every=save_every)

    def spoil(*_):
        if trainer.progress.step == 3:
            trainer.model.backbone.tokens.weight.detach()[:] = math.nan

    trainer.optimizer.register_step_post_hook(spoil)
    with pytest.raises(DivergedError, match=f"{message}.*the last checkpoint is .*checkpoint-{save_every}"):
        trainer.train()
    assert all(value.isfinite().all() for value in weights(tmp_path, save_every).values())
    assert len(losses(tmp_path)) == steps


def test_without_matplotlib(pairs, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    make_trainer(pairs, tokenizer, tmp_path, max_steps=1).train()
    assert "pip install 'warpformer[train]'" in caplog.text
    assert not (tmp_path / "loss.png").exists()


def test_without_tensorboard(pairs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(wf.InputError, match="pip install tensorboard"):
        make_trainer(pairs, tokenizer, tmp_path, tensorboard=True).train()


def test_tensorboard(pairs, tokenizer, tmp_path, monkeypatch):
    written = []

    class Board:
        def add_scalar(self, *args):
            written.append(args)

        def close(self):
            written.append("closed")

    monkeypatch.setattr("warpformer.training.log.board", lambda folder, step: Board())
    make_trainer(pairs, tokenizer, tmp_path, tensorboard=True, max_steps=1).train()
    assert [name for name, *_ in written[:-1]] == [*FIELDS[4:7]]
    assert written[-1] == "closed"


def test_refusals(pairs, tokenizer, tmp_path):
    model = make_model(make_objective(pairs, tokenizer), tokenizer)
    with pytest.raises(wf.InputError, match=r"tokens.weight'.* are not float32"):
        make_trainer(pairs, tokenizer, tmp_path, model=model.bfloat16())
    with pytest.raises(wf.InputError, match="no parameter needs a gradient"):
        make_trainer(pairs, tokenizer, tmp_path, model=model.requires_grad_(False))
    with pytest.raises(wf.InputError, match="patience needs validation data"):
        make_trainer(pairs, tokenizer, tmp_path, patience=1)


def test_a_validation_loss_that_is_no_number_is_not_the_best(pairs, tokenizer, tmp_path):
    valid, saved = make_objective(pairs, tokenizer, range(20)), []
    valid.loss = lambda model, batch: torch.tensor(math.nan)
    trainer = make_trainer(
        pairs, tokenizer, tmp_path, valid=valid, save=lambda *_: saved.append(1), eval_every=2
    )
    with pytest.raises(DivergedError, match="step 2: the validation loss is nan; there is no checkpoint yet"):
        trainer.train()
    assert not saved
