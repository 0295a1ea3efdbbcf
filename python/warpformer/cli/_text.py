"""What commands share that read lines of text."""

import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console


def fail(message) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False, soft_wrap=True)
    sys.exit(1)


def read_lines(path: str) -> list[str]:
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8: {error}")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
