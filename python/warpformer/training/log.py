"""What a run of training says of itself: log.csv, loss.png, a log for TensorBoard, a progress bar."""

import csv
import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from warpformer._C import InputError
from warpformer.models._config import CheckpointError
from warpformer.training.checkpoint import Progress
from warpformer.training.config import TrainConfig
from warpformer.training.distributed import rank

FIELDS = ("step", "epoch", "tokens", "seconds", "learning_rate", "loss", "gradient_norm", "valid_loss")
SMOOTHED = 50  # parts of the curve, each the mean of its steps

log = logging.getLogger("warpformer")


class Log:
    """log.csv in a folder: a row for each step, and one for each evaluation, which has only `valid_loss`.
    `loss` is the mean over the targets of the step; `tokens` and `seconds` count from the start of the run.

    Args:
        folder: where to.
        step: the rows up to it stay, those after it are cut: they will come again.
        tensorboard: whether to write the same numbers for TensorBoard, into folder/tensorboard.

    Raises:
        CheckpointError: there is a log.csv with other columns.
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False):
        self.board = board(folder / "tensorboard", step) if tensorboard else None
        path = folder / "log.csv"
        kept = [row for row in read_rows(path) if int(row["step"]) <= step] if step else []
        partial = path.with_name("log.csv.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(partial, path)
        self.file = path.open("a", buffering=1, newline="", encoding="utf-8")  # a row is there at once
        self.writer = csv.DictWriter(self.file, FIELDS, lineterminator="\n")

    def write(self, row: dict):
        self.writer.writerow(row)
        if self.board is not None:
            for name in FIELDS[4:]:
                if name in row:
                    self.board.add_scalar(name, row[name], row["step"])

    def sync(self):
        """What was written is on the disk from here on."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        self.file.close()
        if self.board is not None:
            self.board.close()


def board(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard = true needs it: pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step + 1)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """The whole rows of a log.csv; of a killed process the last may not be one."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise CheckpointError(f"{path} is no log of training: its columns are {reader.fieldnames}")
        for row in reader:
            if None in row.values():
                return
            yield row


def can_plot() -> bool:
    """Whether matplotlib is there; says what to do if not, before training rather than after it."""
    if importlib.util.find_spec("matplotlib") is not None:
        return True
    log.warning("loss.png will not be drawn without matplotlib: pip install 'warpformer[train]'")
    return False


def plot(folder: Path) -> None:
    """Draws loss.png of log.csv: the loss of every step, its mean over 2 % of them, that of evaluations."""
    from matplotlib.figure import Figure

    rows = [*read_rows(folder / "log.csv")]
    train, valid = (
        np.array([(float(row["step"]), float(row[name])) for row in rows if row[name]]).reshape(-1, 2).T
        for name in ("loss", "valid_loss")
    )
    axes = (figure := Figure((8, 5), layout="constrained")).subplots()
    axes.plot(*train, color="tab:blue", alpha=0.25, linewidth=0.8)
    parts = [part for part in np.array_split(train, SMOOTHED, axis=1) if part.size]
    axes.plot(
        *np.array([part.mean(1) for part in parts]).reshape(-1, 2).T, color="tab:blue", label="training"
    )
    axes.plot(*valid, color="tab:orange", marker="o", markersize=3, label="validation")
    axes.set(xlabel="step", ylabel="loss, nats per target")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = folder / "loss.partial.png"
    figure.savefig(partial, dpi=120)
    os.replace(partial, folder / "loss.png")


class Bar(tqdm):
    """Of steps, as many as the limits allow as far as is known: loss, tokens/s and the time that is left.

    Args:
        config: its limits.
        progress: which the trainer moves on.
        batches: micro-batches of each process in an epoch.
    """

    def __init__(self, config: TrainConfig, progress: Progress, batches: int):
        self.config, self.progress = config, progress
        steps = [config.max_steps] if config.max_steps else []
        if config.max_epochs:
            steps.append(config.max_epochs * math.ceil(batches / config.accumulate))
        super().__init__(
            total=min(steps, default=None),
            initial=progress.step,
            desc="Training",
            unit="step",
            disable=None if rank() == 0 else True,
            smoothing=0.05,
        )

    def show(self, loss: float):
        """One more step; where only the time is limited, the end is what the steps so far come to."""
        progress, config = self.progress, self.config
        if not (config.max_steps or config.max_epochs):
            self.total = max(progress.step, int(progress.step * 60 * config.max_minutes / progress.seconds))
        best = {} if progress.best_loss is None else {"best": f"{progress.best_loss:.3f}"}
        speed = {"tokens/s": f"{progress.tokens / progress.seconds:.0f}"}
        self.set_postfix({"loss": f"{loss:.3f}"} | best | speed, refresh=False)
        self.update()
