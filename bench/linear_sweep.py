"""t(M) of `ops.linear` for every mode of a weight [4096, 4096], and whether it grows as it should:

python -m warpformer.bench.linear_sweep [--json FILE] [--plot FILE.png] [--isa avx2] [--threads 2]
"""

import itertools
import json
import random
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table

from warpformer import ops
from warpformer.bench import _report, roofline
from warpformer.bench._weights import random_weight

SIZE = 4096
ROWS = (
    1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 24, 25, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 384, 512,
)  # fmt: skip
F32, BF16 = torch.float32, torch.bfloat16
MODES = {  # name: format of the weight, its group size, dtype of the input
    "f32": ("f32", 0, F32),
    "bf16": ("bf16", 0, BF16),
    "int8": ("int8", SIZE, BF16),
    "int8_dynamic": ("int8_dynamic", SIZE, F32),
    "int4 g128": ("int4", 128, BF16),
    "int4 g128 f32 input": ("int4", 128, F32),
    "int4_dynamic g32": ("int4_dynamic", 32, F32),
    "nf4 g64": ("nf4", 64, BF16),
}
MORE_ROWS, ONE_MORE_ROW = 1.1, 1.4  # how much longer fewer rows may take, and how much one more may cost
LAP_SECONDS = 0.005


class Mode(NamedTuple):
    """Weights that no cache holds, and an input of the most rows."""

    input: torch.Tensor
    weights: itertools.cycle

    def seconds(self, rows, calls):
        """Per call."""
        x = self.input[:rows]
        ops.linear(x, next(self.weights))  # of the last lap nothing is left in the caches
        start = perf_counter()
        for _ in range(calls):
            ops.linear(x, next(self.weights))
        return (perf_counter() - start) / calls


def make(format, group_size, dtype):
    first = pack(format, group_size, dtype)
    count = -(-roofline.past_cache() // first.data.nbytes)
    weights = [first, *(pack(format, group_size, dtype) for _ in range(count - 1))]
    return Mode(torch.randn(ROWS[-1], SIZE).to(dtype), itertools.cycle(weights))


def pack(format, group_size, dtype):
    if group_size:
        return ops.pack_linear(random_weight(format, SIZE, SIZE, group_size))
    return ops.pack_linear(torch.randn(SIZE, SIZE, dtype=dtype))


def measure(rounds):
    """{mode: [seconds per call, by ROWS]}, medians of rounds, each of which goes through all, the numbers of
    rows in another order: neighbours in time, which share the memory's state, are not always the same."""
    modes = {name: make(*layout) for name, layout in MODES.items()}
    calls = {
        (name, rows): max(1, round(LAP_SECONDS / mode.seconds(rows, 1)))
        for name, mode in modes.items()
        for rows in ROWS
    }
    laps = {key: [] for key in calls}
    for _ in range(rounds):
        for name, mode in modes.items():
            for rows in random.sample(ROWS, len(ROWS)):
                laps[name, rows].append(mode.seconds(rows, calls[name, rows]))
    return {name: [median(laps[name, rows]) for rows in ROWS] for name in modes}


def violations(times):
    """A line for every pair of times that is out of proportion."""
    for name, ts in times.items():
        for (m, t), (more, longer) in itertools.combinations(zip(ROWS, ts, strict=True), 2):
            if t > MORE_ROWS * longer:
                yield f"{name}: M = {m} takes {t / longer:.2f} times as long as M = {more}"
            if more == m + 1 and longer > ONE_MORE_ROW * t:
                yield f"{name}: M = {more} takes {longer / t:.2f} times as long as M = {m}"
        for m, t, f32 in zip(ROWS, ts, times["f32"], strict=True):
            if t > f32:
                yield f"{name}: M = {m} takes {t / f32:.2f} times as long as f32"


def table(times):
    table = Table(title="Milliseconds")
    for heading in ("M", *times):
        table.add_column(heading, justify="right")
    for m, *row in zip(ROWS, *times.values(), strict=True):
        table.add_row(str(m), *(f"{1e3 * t:.3g}" for t in row))
    return table


def plot(times, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for name, ts in times.items():
        axes.plot(ROWS, [1e3 * t for t in ts], marker=".", label=name)
    axes.set(xscale="log", yscale="log", xlabel="M", ylabel="ms", title=f"linear, N = K = {SIZE}")
    axes.set_xticks([2**i for i in range(10)], [2**i for i in range(10)])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write times and violations here.")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Draw t(M) here (matplotlib).")] = None,
    isa: Annotated[str | None, typer.Option(help="Cap the instruction set.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default="torch's")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
):
    torch.set_num_threads(threads or torch.get_num_threads())
    console = Console()
    with roofline.isa(isa), torch.inference_mode():
        times = measure(rounds)
    found = list(violations(times))
    console.print(table(times))
    for line in found:
        console.print(line, style="red", markup=False, highlight=False)
    if json_path:
        ms = {name: [float(f"{1e3 * t:.4g}") for t in ts] for name, ts in times.items()}
        facts = {"machine": _report.machine(), "threads": torch.get_num_threads(), "rows": ROWS, "ms": ms}
        json_path.write_text(json.dumps(facts | {"violations": found}, indent=1) + "\n")
    if plot_path:
        plot(times, plot_path)
    raise typer.Exit(int(bool(found)))


if __name__ == "__main__":
    typer.run(main)
