"""The command line: `warpformer demo | embed | generate | translate | perplexity | train | quantize...`."""

import json
import logging
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import warpformer as wf
from warpformer.cli._chat import chat
from warpformer.cli._demo import demo
from warpformer.cli._encoder import EncoderOption, load_encoder
from warpformer.cli._generate import generate, translate
from warpformer.cli._perplexity import perplexity
from warpformer.cli._quantize import quantize
from warpformer.cli._text import DeviceOption, fail, read_lines

app = typer.Typer(
    help="Fused Transformer kernels, drop-in for PyTorch.", no_args_is_help=True, add_completion=False
)
console = Console()
for command in (chat, demo, generate, perplexity, quantize, translate):
    app.command()(command)


def main():
    try:
        app()
    except (ArithmeticError, ImportError, OSError, ValueError) as error:  # ours are among them
        fail(error)


@app.command()
def embed(
    text: Annotated[str, typer.Argument(help="File of sentences, one a line; - is standard input.")] = "-",
    model: EncoderOption = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="A .npy or .jsonl file; - prints JSON lines.")
    ] = "-",
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences per step.")] = 32,
    normalize: Annotated[bool, typer.Option(help="Scale embeddings to length 1.")] = False,
    device: DeviceOption = "cpu",
):
    """Writes the embedding of every line: rows of a .npy, or lines {"text": ..., "embedding": [...]}."""
    if output != "-" and Path(output).suffix not in (".npy", ".jsonl"):
        raise typer.BadParameter("the name must end in .npy or .jsonl", param_hint="--output")
    sentences = read_lines(text)
    encoder = load_encoder(model, device)
    chunk = 64 * batch_size  # long enough for sorting by length to pay, short enough to write as it goes
    with (
        open_output(output, (len(sentences), encoder.get_embedding_dimension())) as write,
        tqdm(total=len(sentences), desc="Embedding", unit="sentence") as bar,
    ):
        for start in range(0, len(sentences), chunk):
            texts = sentences[start : start + chunk]
            rows = encoder.encode(
                texts, batch_size=batch_size, show_progress_bar=False, normalize_embeddings=normalize
            )
            write(start, texts, rows)
            bar.update(len(texts))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A .toml file; docs/training.md has its keys.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run.", show_default="out of CONFIG")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
):
    """Trains a model as CONFIG says. Ctrl-C ends it with a checkpoint, from which --resume goes on.

    On several processes: torchrun --nproc-per-node 2 -m warpformer train CONFIG.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    from warpformer.training import run

    is_first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(format="%(message)s")
    run.log.setLevel(logging.INFO if is_first else logging.ERROR)
    settings = run.read_run_config(config)
    if out is not None:
        settings.out = str(out)
    with logging_redirect_tqdm():
        result = run.train(settings, resume=resume)
    progress = result.progress
    ended = f"{result.reason} after step {progress.step}, {progress.tokens} tokens, {progress.seconds:.0f} s"
    if result.signal is not None and is_first:
        option = "" if out is None else f" --out {out}"
        print(f"{ended}; to go on: warpformer train {config}{option} --resume", file=sys.stderr)
    if result.signal is not None:
        sys.exit(128 + result.signal)
    if not is_first:
        return
    best = "" if progress.best_loss is None else f"; validation loss {progress.best_loss:.4f}"
    console.print(f"{ended}{best}; the model is in {settings.out}", highlight=False, soft_wrap=True)


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="What to time; everything if none.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    isa: Annotated[str | None, typer.Option(help="Cap the instruction set, torch's too.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="torch's")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the rows here.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A .tsv file, English second, for sentence_encoder.")
    ] = None,
):
    """Times ops and models beside their peers, as shares of what this machine can do at most."""
    from warpformer.bench import PEERS_AT, run

    caps = PEERS_AT.get(isa, {})
    if not caps.items() <= os.environ.items():  # torch has loaded without them: once more, with them
        command = [sys.executable, "-m", "warpformer", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=os.environ | caps, check=False).returncode)
    sys.exit(run(ops or [], device=device, isa=isa, threads=threads, json_path=json_path, data=data))


@app.command()
def info():
    """Version, instruction set, threads and CUDA of this installation."""
    table = Table(show_header=False)
    for name, value in wf.info().items():
        table.add_row(name, str(value))
    console.print(table)


@contextmanager
def open_output(output: str, shape: tuple[int, int]):
    """Yields write(first row, texts, rows). A file takes its name when it is whole; an interrupted run
    leaves what was there before, and its own part in <name>.partial."""
    if output == "-":
        yield lambda start, texts, rows: print_rows(sys.stdout, texts, rows)
        return
    partial = Path(output + ".partial")
    if output.endswith(".npy"):
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)

        def write(start, texts, rows):
            array[start : start + len(rows)] = rows

        yield write
        array.flush()
    else:
        with partial.open("w", encoding="utf-8") as file:
            yield lambda start, texts, rows: print_rows(file, texts, rows)
    os.replace(partial, output)


def print_rows(file, texts, rows):
    for text, row in zip(texts, rows.tolist(), strict=True):
        print(json.dumps({"text": text, "embedding": row}, ensure_ascii=False), file=file, flush=True)
