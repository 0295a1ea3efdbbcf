"""One sequence out of another."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from warpformer._C import InputError
from warpformer.training.objectives.objective import Batch, Example, Objective, joined, pad
from warpformer.training.ragged import Ragged
from warpformer.training.text import Texts
from warpformer.training.tokenizer import BOS, EOS, encode, token_id


class TeacherForcing(Objective):
    """Every token of the target, of the source and of the target's tokens before it.

        decoder_input_ids = decoder_start, target[:-1]        labels = target
        loss = mean over tokens of -log p(target[t] | source, target[: t])

    A relative has examples of `source` and `target` tokens, and may tell which of the latter are `hidden`:
    text that the source has not. The model is a ConditionalGeneration of `models`.
    Source: Williams and Zipser, "A Learning Algorithm for Continually Running Fully Recurrent Neural
    Networks".
    """

    decoder_start = BOS  # what the decoder reads first

    def __init__(self, texts: Texts, tokenizer: Tokenizer, **options):
        super().__init__(texts, tokenizer, **options)
        self.bos, self.eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
        self.start = token_id(tokenizer, self.decoder_start)

    @property
    def token_ids(self) -> dict[str, int]:
        return dict(
            pad_token_id=self.pad,
            bos_token_id=self.bos,
            eos_token_id=self.eos,
            decoder_start_token_id=self.start,
        )

    def collate(self, examples: Sequence[Example]) -> Batch:
        targets = [example["target"] for example in examples]
        source, source_there = pad([example["source"] for example in examples], self.pad)
        shifted, there = pad([np.concatenate([[self.start], target[:-1]]) for target in targets], self.pad)
        inputs = dict(
            input_ids=source,
            attention_mask=source_there,
            decoder_input_ids=shifted,
            decoder_attention_mask=there,
        )
        labels = joined(targets)
        return Batch(inputs, labels, len(labels), int(source_there.sum()) + len(labels))


class Seq2Seq(TeacherForcing):
    """The second column of texts out of the first, as in translation.

        source = first </s>        target = second </s>        decoder_start = <s>

    Rows of which either is above max_length are skipped and counted. Source: Sutskever et al., "Sequence to
    Sequence Learning with Neural Networks"; "Attention Is All You Need", 5.4 (label smoothing).

    Raises:
        InputError: the texts have not two columns, or no row is short enough.
    """

    columns = 2

    def __init__(self, texts: Texts, tokenizer: Tokenizer, **options):
        super().__init__(texts, tokenizer, **options)
        self.sides = [ended(encode(tokenizer, texts.column(side)), self.eos) for side in (0, 1)]
        longest = np.maximum(*(side.lengths for side in self.sides))
        self.rows = np.flatnonzero(longest <= self.max_length)
        if len(self.rows) < len(longest):
            self.skipped["longer than max_length"] = len(longest) - len(self.rows)
        if not len(self.rows):
            raise InputError(f"Seq2Seq: every row is longer than max_length = {self.max_length}")

    def lengths(self) -> np.ndarray:
        return sum(side.lengths[self.rows] for side in self.sides)

    def example(self, index: int, epoch: int) -> Example:
        source, target = (side[self.rows[index]] for side in self.sides)
        return dict(source=source, target=target)


def ended(tokens: Ragged, end: int) -> Ragged:
    """Each array with `end` after it."""
    values = np.insert(tokens.values, tokens.starts[1:], end)
    return Ragged(values, tokens.starts + np.arange(len(tokens) + 1))
