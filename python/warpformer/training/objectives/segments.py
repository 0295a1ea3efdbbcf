"""Documents as sequences of tokens that a model has room for."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from warpformer._C import InputError
from warpformer.training.ragged import Ragged
from warpformer.training.text import Texts
from warpformer.training.tokenizer import encode


def encode_lines(texts: Texts, tokenizer: Tokenizer) -> tuple[Ragged, np.ndarray]:
    """Tokens of each row, and of a line break, which is between two rows of a document."""
    line_break = np.asarray(tokenizer.encode("\n", add_special_tokens=False).ids, np.int32)
    return encode(tokenizer, texts.column()), line_break


@dataclass(frozen=True)
class Segments:
    """Runs of whole lines of documents, as long as a limit lets them be; a line above it is cut.

    Attributes:
        tokens: of each segment.
        documents: [segments], the number of the document that each is from.
    """

    tokens: Ragged
    documents: np.ndarray

    @classmethod
    def of(cls, texts: Texts, tokenizer: Tokenizer, limit: int) -> "Segments":
        """Segments of at most `limit` tokens.

        Raises:
            InputError: that is below 2.
        """
        if limit < 2:
            raise InputError(f"max_length leaves {limit} tokens for text")
        lines, line_break = encode_lines(texts, tokenizer)
        tokens, documents = [], []
        for number, document in enumerate(texts.documents):
            found = list(runs([lines[row] for row in document], line_break, limit))
            tokens += found
            documents += [number] * len(found)
        return cls(Ragged.of(tokens), np.asarray(documents, np.int64))


def runs(lines: list[np.ndarray], line_break: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    run, length = [], 0
    for line in (whole[i : i + limit] for whole in lines for i in range(0, len(whole), limit)):
        added = len(line) + (len(line_break) if run else 0)
        if length + added > limit:
            yield np.concatenate(run)
            run, length, added = [], 0, len(line)
        run += [line_break, line] if run else [line]
        length += added
    if run:
        yield np.concatenate(run)
