"""What a benchmark run leaves behind: tables for people, JSON for machines."""

import json
import platform
import subprocess
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from warpformer import _C
from warpformer.bench import roofline

GPU_FACTS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit",
)  # fmt: skip


class ProgressBar:
    """How many cases are done, and the op under way; gone when the run ends."""

    def __init__(self, console):
        self.bar = Progress(
            BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
            console=console, transient=True,
        )  # fmt: skip

    def start(self, total):
        self.task = self.bar.add_task("", total=total)
        self.bar.start()

    def show(self, description):
        self.bar.update(self.task, description=description)

    def advance(self):
        self.bar.advance(self.task)

    def stop(self):
        self.bar.stop()


def machine():
    """Facts that the figures depend on; nothing that names the machine."""
    gpu = {"gpu": _gpu()} if roofline.on_gpu() else {}
    return gpu | {
        "cpu": _cpu_model(),
        "cores": roofline.cores(),
        "last_level_cache": roofline.last_level_cache(),
        "isa": _C.best_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "warpformer": _C.__version__,
    }


def _gpu():
    """Name, driver, clocks now and at most (MHz), power limit (W), as nvidia-smi tells them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {"name": torch.cuda.get_device_name()}
    return dict(zip(GPU_FACTS, (value.strip() for value in values.split(",")), strict=True))


def _cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.machine()
    # Virtual machines often hide the name; family and model still tell the microarchitecture.
    return f"{facts['model name']} (family {facts.get('cpu family')}, model {facts.get('model')})"


def limits_table(limits):
    table = Table(title="Limits: GB/s, GFLOP/s (int8: GOP/s)")
    names = roofline.MEMORY + roofline.COMPUTE
    for heading in ("isa", "threads", *names):
        table.add_column(heading, justify="left" if heading == "isa" else "right")
    found = {(row["isa"], row["threads"], row["limit"]): f"{row['giga_per_s']:.4g}" for row in limits}
    for isa, threads in dict.fromkeys((row["isa"], row["threads"]) for row in limits):
        table.add_row(isa, str(threads), *(found.get((isa, threads, name), "-") for name in names))
    return table


def rows_table(rows):
    table = Table(title=f"{rows[0]['isa']}, {rows[0]['threads']} threads")
    for heading in ("op", "case", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("ms", "GB/s", "GFLOP/s", "of limit", "speed"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["op"],
            "\n".join(row[key] for key in ("case", "note") if key in row),
            row["dtype"],
            f"{row['ms']:.3g}" if row["ms"] < 1000 else f"{row['ms']:.0f}",
            f"{row['gb_per_s']:.3g}",
            f"{row['gflop_per_s']:.3g}",
            f"{row['share']:.0%} {row['limit']}",
            "\n".join(f"{ratio:.2f}x {name}" for name, ratio in row["peers"].items()),
        )
    return table


def write_json(path, limits, rows):
    """One row a line, so that the differences of two results can be read."""

    def lines(items):
        return "[\n" + ",\n".join("  " + json.dumps(_round(item)) for item in items) + "\n]"

    text = f'{{\n"machine": {json.dumps(machine())},\n"limits": {lines(limits)},\n"rows": {lines(rows)}\n}}\n'
    Path(path).write_text(text)


def _round(value):
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return {k: _round(v) for k, v in value.items()} if isinstance(value, dict) else value
