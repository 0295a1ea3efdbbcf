"""Language modelling."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from warpformer.training.objectives.objective import Batch, Example, Objective, joined, pad
from warpformer.training.objectives.segments import encode_lines
from warpformer.training.text import Texts
from warpformer.training.tokenizer import EOS, token_id


class CausalLM(Objective):
    """The next token, of all that are before it.

        stream = </s> document </s> document </s> ...        with line breaks between the lines of a document
        example i reads stream[i L : (i + 1) L] and predicts stream[i L + 1 : (i + 1) L + 1]
        loss = mean over tokens of -log p(token | those before it in the example)

    so that every token of the documents is predicted once. L is max_length. Of several documents `</s>`,
    which is before each, becomes the model's bos_token_id, with which it begins to generate; of one it would
    be a token that it hardly knows. The model is a CausalLM of `models`. Source: Radford et al., "Improving
    Language Understanding by Generative Pre-Training".
    """

    def __init__(self, texts: Texts, tokenizer: Tokenizer, **options):
        super().__init__(texts, tokenizer, **options)
        self.eos = token_id(tokenizer, EOS)
        self.stream = stream_of(texts, tokenizer, self.eos)
        self.documents = len(texts.documents)

    @property
    def token_ids(self) -> dict[str, int]:
        begin = dict(bos_token_id=self.eos) if self.documents > 1 else {}
        return dict(pad_token_id=self.pad, eos_token_id=self.eos) | begin

    def lengths(self) -> np.ndarray:
        starts = np.arange(0, len(self.stream) - 1, self.max_length)
        return np.diff(starts, append=len(self.stream) - 1)

    def example(self, index: int, epoch: int) -> Example:
        begin = index * self.max_length
        block = self.stream[begin : begin + self.max_length + 1]
        return dict(tokens=block[:-1], labels=block[1:])

    def collate(self, examples: Sequence[Example]) -> Batch:
        tokens, there = pad([example["tokens"] for example in examples], self.pad)
        labels = joined([example["labels"] for example in examples])
        return Batch(dict(input_ids=tokens, attention_mask=there), labels, len(labels), len(labels))


def stream_of(texts: Texts, tokenizer: Tokenizer, end: int) -> np.ndarray:
    """`end` and, of each document, its tokens and `end`, with line breaks between its lines; [N] int32."""
    lines, line_break = encode_lines(texts, tokenizer)
    end = np.array([end], np.int32)
    pieces = [end]
    for document in texts.documents:
        for row in document:
            pieces += [lines[row], end if row == document[-1] else line_break]
    return np.concatenate(pieces)
