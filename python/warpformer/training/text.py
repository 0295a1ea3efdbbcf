"""Files of text, and what in them cannot be used."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from warpformer._C import InputError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
SHOWN = 5  # line numbers of a report


@dataclass
class Texts:
    """Rows of text.

    Attributes:
        path: of the file.
        rows: of each the texts of its columns.
        documents: runs of rows that belong together, in order; one of all rows for a file with columns.
        lines: reason -> numbers, from 1 on, of the lines that were skipped.
    """

    path: Path
    rows: list[tuple[str, ...]] = field(default_factory=list)
    documents: list[range] = field(default_factory=list)
    lines: dict[str, list[int]] = field(default_factory=dict)

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> how many lines."""
        return {reason: len(numbers) for reason, numbers in self.lines.items()}

    def report(self) -> str:
        """What was skipped, a line for each reason; "" if nothing was."""
        return "\n".join(
            f"{self.path}: skipped {len(numbers)} lines: {reason} (line {first(numbers)})"
            for reason, numbers in self.lines.items()
        )

    def column(self, index: int = 0) -> list[str]:
        return [row[index] for row in self.rows]


def first(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")


def read_texts(path, columns: Sequence[int] | None = None, *, max_bytes: int = 1 << 16) -> Texts:
    """Reads a file of UTF-8 text; a row of it is a line.

    Args:
        path: the file.
        columns: which fields of tab-separated ones a row has, counted from 0; the whole line if None, and
            then a blank line ends a document.
        max_bytes: a longer line is skipped.

    Returns:
        Texts: rows without white space at their ends. Lines that are no UTF-8, too long, empty or without one
        of the columns are skipped and counted.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: no row is left, or a column is negative.
    """
    return parse_texts(Path(path).read_bytes(), path, columns, max_bytes=max_bytes)


def parse_texts(
    data: bytes, path, columns: Sequence[int] | None = None, *, max_bytes: int = 1 << 16
) -> Texts:
    """`read_texts` of what a file has."""
    if columns is not None and (not columns or min(columns) < 0):
        raise InputError(f"read_texts: columns = {list(columns)} are no numbers of columns")
    texts, begin = Texts(Path(path)), 0
    data = data.removeprefix(BYTE_ORDER_MARK)
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
        try:
            row = parse(line, columns, max_bytes)
        except LineError as error:
            texts.lines.setdefault(str(error), []).append(number)
            continue
        if row is not None:
            texts.rows.append(row)
        elif begin < len(texts.rows):
            texts.documents.append(range(begin, len(texts.rows)))
            begin = len(texts.rows)
    if begin < len(texts.rows):
        texts.documents.append(range(begin, len(texts.rows)))
    if not texts.rows:
        raise InputError(f"{path} has no text that can be used: {texts.report() or 'it is empty'}")
    return texts


class LineError(Exception):
    """Why a line is skipped."""


def parse(line: bytes, columns: Sequence[int] | None, max_bytes: int) -> tuple[str, ...] | None:
    """The row of a line; None for the end of a document."""
    if len(line) > max_bytes:
        raise LineError("too long")
    try:
        text = line.decode()
    except UnicodeDecodeError:
        raise LineError("invalid UTF-8") from None
    if columns is None:
        return (text.strip(),) if text.strip() else None
    if not text.strip():
        raise LineError("empty line")
    fields = text.split("\t")
    if max(columns) >= len(fields):
        raise LineError("missing column")
    row = tuple(fields[column].strip() for column in columns)
    if not all(row):
        raise LineError("empty column")
    return row
