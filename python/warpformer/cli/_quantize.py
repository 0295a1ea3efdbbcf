"""`warpformer quantize`."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

import warpformer as wf
from warpformer.checkpoint import find_checkpoint
from warpformer.cli._text import fail

# Files beside the weights, of a model that is no SentenceEncoder, which writes its own.
KEPT = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "train.json",
)


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; new or empty.")],
    to: Annotated[str, typer.Option(help="int8, int8_dynamic, int4, int4_dynamic or nf4.")] = "int8",
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Weights per scale: 32, 64, 128, -1 for a row.", show_default="128, a row of 8 bits"
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="mse: clip where it lessens the error.", show_default="none")
    ] = None,
    zero_points: Annotated[bool, typer.Option("--zero-points", help="A zero per group, int4 only.")] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="Name of a layer to leave, * and ? as wildcards.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of what stays in floats, and of activations.", show_default="that of MODEL"),
    ] = None,
):
    """Writes a model with its linear layers in fewer bits, and prints what that costs."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"{out} exists and is not empty")
    folder = find_checkpoint(model)
    is_encoder = (folder / "modules.json").exists()
    read = wf.SentenceEncoder if is_encoder else wf.load
    whole = read(folder, dtype=getattr(torch, dtype) if dtype else None)
    network = whole.model if is_encoder else whole
    before = total_bytes(network)
    report = wf.quantize_(network, to, group_size, skip=skip or (), clip=clip, zero_points=zero_points)
    if is_encoder:
        whole.save(out)
    else:
        wf.save(network, out)
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
    table = Table(title=f"{model} in {to}")
    for column in ("layer", "shape", "KiB before", "after", "error of the weight"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for row in report:
        shape = " x ".join(map(str, row.shape))
        sizes = f"{row.bytes_before / 1024:.0f}", f"{row.bytes_after / 1024:.0f}"
        table.add_row(row.name, shape, *sizes, row.note or f"{row.error:.3%}")
    sizes = f"{before / 2**20:.1f} MiB before, {total_bytes(network) / 2**20:.1f} MiB after"
    console = Console(highlight=False)
    console.print(table)
    console.print(f"{sizes}, embeddings and all")


def total_bytes(model) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
