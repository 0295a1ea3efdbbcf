"""The loop of training: steps, evaluations, checkpoints."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from warpformer._C import InputError
from warpformer.save import save as save_model
from warpformer.training import distributed
from warpformer.training.batches import Batches
from warpformer.training.checkpoint import (
    Progress,
    checkpoints,
    fingerprint,
    read_checkpoint,
    sync,
    trained_parameters,
    write_checkpoint,
)
from warpformer.training.config import TrainConfig
from warpformer.training.evaluation import summed_loss
from warpformer.training.log import Bar, Log, can_plot, plot
from warpformer.training.objectives.objective import Batch, Objective
from warpformer.training.schedule import learning_rate
from warpformer.training.signals import signals

log = logging.getLogger("warpformer")


class DivergedError(ArithmeticError):
    """The loss or its gradient is no number."""


@dataclass
class Result:
    """What a run came to.

    Attributes:
        reason: max_steps, max_epochs, max_minutes, patience or interrupted.
        progress: steps, tokens, seconds; best_loss and best_step of the validation data.
        signal: the number of the signal, where interrupted.
    """

    reason: str
    progress: Progress
    signal: int | None = None


class Loss(nn.Module):
    """An objective as a module, whose forward is what DistributedDataParallel waits for."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> Tensor:
        return self.objective.loss(self.model, batch)


class Trainer:
    """Trains a model.

        gradient = sum over micro-batches b of (targets(b) / targets of the step) d loss(b), of all processes
        gradient = gradient min(1, clip / |gradient|)
        AdamW, in which matrices and tables alone decay, with the step's `learning_rate`

    so that a step of k micro-batches, or of k processes, is that of the one large batch. Everything random
    follows from the seed, the epoch and the number of the batch: the seed of dropout, too, is that of the
    micro-batch, whichever process computes it. So a run that is killed at any moment and resumed gives the
    losses and weights of one that was not, bit for bit, with as many threads on the same machine.

    The folder `out` gets log.csv, loss.png, `checkpoint-<step>` (the two newest) and, as `save` writes it,
    the model: that of the lowest loss of `valid`, or without `valid` the newest.

    Args:
        model: in float32, on the device to train on; parameters that need no gradient stay.
        objective: what to learn.
        config: how.
        out: a folder of its own.
        valid: the objective on other texts, to choose the best model by and to stop early.
        save: writes a model into a folder; `warpformer.save` if None.

    Raises:
        InputError: nothing is to be trained, or not in float32; what is configured cannot be.

    Under torchrun, in an initialized process group, every process makes the same Trainer, and rank 0 writes.
    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization"; Pascanu et al., "On the
    difficulty of training recurrent neural networks" (clipping).
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        out,
        *,
        valid: Objective | None = None,
        save: Callable[[nn.Module, Path], None] | None = None,
    ):
        self.model, self.objective, self.config, self.valid = model, objective, config, valid
        self.out = Path(out).expanduser()
        self.save = save or save_model
        self.rank, self.world = distributed.rank(), distributed.world()
        parameters = trained_parameters(model)
        wrong = [name for name, value in parameters.items() if value.dtype != torch.float32]
        if wrong or not parameters:
            reason = f"{wrong[:8]} are not float32" if wrong else "no parameter needs a gradient"
            raise InputError(f"Trainer: {reason}")
        if config.patience and valid is None:
            raise InputError("Trainer: patience needs validation data")
        self.parameters = [*parameters.values()]
        self.device = self.parameters[0].device
        self.optimizer = adamw(self.parameters, config)
        self.batches = Batches(objective, config.max_tokens, config.seed, self.rank, self.world)
        self.valid_batches = None if valid is None else Batches(valid, config.max_tokens).epoch(0)
        self.progress = Progress()
        self.saved = 0  # the step of the newest checkpoint
        self.log: Log | None = None  # of rank 0, while it trains
        data = {"train": fingerprint(objective)} | ({} if valid is None else {"valid": fingerprint(valid)})
        # What a checkpoint must share with a run that goes on from it.
        self.identity = {"train": asdict(config), "data": data, "processes": self.world}

    def resume(self) -> int:
        """Goes on from the newest checkpoint in `out`, and returns its step; 0 if there is none.

        Raises:
            CheckpointError: a file of it is damaged, or it is of another model, data or configuration. An
                older one is not taken instead: remove the folder that is named, and that is what comes next.
        """
        found = checkpoints(self.out)
        if found:
            self.progress = read_checkpoint(
                found[-1], self.model, self.optimizer, self.identity, self.config.free()
            )
            self.saved = self.progress.step
        return self.progress.step

    def train(self) -> Result:
        """Trains up to the first limit. SIGINT and SIGTERM end it after the step that they find, with a
        checkpoint; one more, after three seconds, ends it at once.

        Raises:
            DivergedError: the loss or the gradient of a step is no number; the checkpoints before it stay.
            FileExistsError: `out` has checkpoints, and `resume` was not called.
        """
        if self.progress.step == 0 and checkpoints(self.out):
            raise FileExistsError(f"{self.out} has checkpoints: resume, or choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic() - self.progress.seconds
        self.model.train()
        loss = Loss(self.model, self.objective)
        self.network = DistributedDataParallel(loss) if self.world > 1 else loss
        with ExitStack() as stack:
            caught = stack.enter_context(signals())
            plots = False
            if self.rank == 0:
                self.log = Log(self.out, self.progress.step, self.config.tensorboard)
                stack.callback(self.log.close)
                plots = can_plot()
            bar = stack.enter_context(Bar(self.config, self.progress, len(self.batches.epoch(0))))
            reason = self.run(caught, bar)
            self.finish(reason)
        if plots:
            plot(self.out)
        return Result(reason, replace(self.progress), caught[0] if caught else None)

    def run(self, caught: list[int], bar: Bar) -> str:
        """Steps until there is a reason to stop, which is returned."""
        config, progress = self.config, self.progress
        for micro_batches in self.steps():
            if reason := self.reason_to_stop(caught):
                return reason
            row = self.step(micro_batches)
            self.write(row)
            bar.show(row["loss"])
            if self.valid is not None and progress.step % config.eval_every == 0:
                self.evaluate_and_keep_best()
            if progress.step % config.save_every == 0:
                self.checkpoint()
        return "max_epochs"

    def steps(self) -> Iterator[list[tuple[int, list[int]]]]:
        """(number in the epoch, indices of examples) of each micro-batch of this process in each step."""
        progress, size = self.progress, self.config.accumulate
        while progress.epoch != self.config.max_epochs:
            batches = [*enumerate(self.batches.epoch(progress.epoch))]
            for begin in range(progress.batch, len(batches), size):
                yield batches[begin : begin + size]
            progress.epoch, progress.batch = progress.epoch + 1, 0

    def reason_to_stop(self, caught: list[int]) -> str | None:
        """The same in all processes, for they ask at the same step."""
        config, progress = self.config, self.progress
        late = config.max_minutes is not None and time.monotonic() - self.started > 60 * config.max_minutes
        interrupted, late = distributed.total(len(caught), late)
        reasons = {
            "interrupted": interrupted,
            "max_steps": config.max_steps is not None and progress.step >= config.max_steps,
            "max_minutes": late,
            "patience": config.patience is not None and progress.evaluations_since_best >= config.patience,
        }
        return next((name for name, applies in reasons.items() if applies), None)

    def step(self, micro_batches: list[tuple[int, list[int]]]) -> dict:
        """One step of the optimizer; its row of the log."""
        config, progress = self.config, self.progress
        batches = [self.objective.batch(indices, progress.epoch) for _, indices in micro_batches]
        targets, tokens = distributed.total(sum(b.targets for b in batches), sum(b.tokens for b in batches))
        rate = learning_rate(
            config.schedule, progress.step + 1, config.learning_rate, config.warmup_steps, config.max_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        for (number, _), batch in zip(micro_batches, batches, strict=True):
            torch.manual_seed(seed_of(config.seed, progress.epoch, number * self.world + self.rank))
            is_last = number == micro_batches[-1][0]
            with nullcontext() if is_last or self.world == 1 else self.network.no_sync():
                with self.autocast():
                    part = self.network(batch.to(self.device))
                part = part.float() * (batch.targets / targets)
                (part * self.world).backward()  # of which DistributedDataParallel takes the mean
            loss += part.detach()
        (loss,) = distributed.total(loss.item())
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.diverged(progress.step + 1, f"the loss is {loss}, the norm of its gradient {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        progress.batch = micro_batches[-1][0] + 1
        progress.tokens += int(tokens)
        progress.seconds = time.monotonic() - self.started
        return {"learning_rate": rate, "loss": loss, "gradient_norm": norm}

    def autocast(self):
        dtype = None if self.config.autocast is None else getattr(torch, self.config.autocast)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def evaluate(self) -> float:
        """The mean loss over the targets of `valid`, without dropout."""
        self.model.eval()
        with self.autocast():
            own = self.valid_batches[self.rank :: self.world]
            loss, targets = summed_loss(self.model, self.valid, own, self.device)
        self.model.train()
        loss, targets = distributed.total(loss, targets)
        return loss / targets

    def evaluate_and_keep_best(self):
        progress, loss = self.progress, self.evaluate()
        if not math.isfinite(loss):
            self.diverged(progress.step, f"the validation loss is {loss}")
        self.write({"valid_loss": loss})
        progress.evaluated = progress.step
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            self.save_result()
        else:
            progress.evaluations_since_best += 1
        log.info(
            "step %d: validation loss %.4f, lowest %.4f at step %d",
            progress.step, loss, progress.best_loss, progress.best_step,
        )  # fmt: skip

    def write(self, values: dict):
        """A row of the log."""
        if self.log is not None:
            progress = self.progress
            names = ("step", "epoch", "tokens", "seconds")
            self.log.write({name: getattr(progress, name) for name in names} | values)

    def save_result(self):
        if self.rank == 0:
            self.save(self.model, self.out)
            for path in self.out.iterdir():
                if path.is_file():
                    sync(path)

    def checkpoint(self):
        """Writes one, unless this step has one."""
        if self.progress.step == self.saved:
            return
        if not all(bool(parameter.isfinite().all()) for parameter in self.parameters):
            self.diverged(self.progress.step, "a parameter is no number any more")
        if self.rank == 0:
            self.log.sync()
            write_checkpoint(self.out, self.model, self.optimizer, self.progress, self.identity)
            if self.valid is None:
                self.save_result()
        self.saved = self.progress.step

    def finish(self, reason: str):
        """The last checkpoint, and before it, unless interrupted, the last evaluation."""
        progress = self.progress
        if self.valid is not None and reason != "interrupted" and progress.evaluated != progress.step:
            self.evaluate_and_keep_best()
        self.checkpoint()

    def diverged(self, step: int, what: str) -> NoReturn:
        found = checkpoints(self.out)
        last = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        raise DivergedError(
            f"step {step}: {what}; {last}. A lower learning_rate or a longer warm-up may help"
        )


def adamw(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=tuple(config.betas), eps=config.eps, fused=True
    )


def seed_of(*numbers: int) -> int:
    """A seed that all of the numbers decide."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
