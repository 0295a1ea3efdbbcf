"""What commands share that read lines of text."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console

INTERRUPTED = 130  # the exit status after Ctrl-C


def fail(message) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
    sys.exit(1)


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the command, after what is written."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def check_device(device: str) -> str:
    if device.split(":")[0] not in ("cpu", "cuda"):
        fail(f"--device {device}: is neither cpu nor cuda")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # of a torch that is built without it
        fail(f"--device {device}: {str(error).splitlines()[0]}")
    return device


DeviceOption = Annotated[
    str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1...", callback=check_device)
]


def read_lines(path: str) -> list[str]:
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error}")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
