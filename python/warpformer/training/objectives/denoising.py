"""BART's objective."""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from warpformer._C import InputError
from warpformer.training.objectives.objective import Example
from warpformer.training.objectives.segments import Segments
from warpformer.training.objectives.seq2seq import TeacherForcing
from warpformer.training.objectives.words import Words
from warpformer.training.text import Texts
from warpformer.training.tokenizer import EOS, MASK, token_id

SPAN = 3  # tokens of an infilled span, in the mean
NOISES = ("permutation", "rotation", "deletion", "infilling")


class Denoising(TeacherForcing):
    """A text, out of what noise left of it.

        source = <s> noise(text) </s>        target = text </s>        decoder_start = </s>

        permutation: sentences in random order
        rotation:    begins with a random token, and goes on from the end with the beginning
        deletion:    tokens are missing
        infilling:   spans of Poisson(3) tokens are one <mask> each, those of no token too

    The model is bart's ConditionalGeneration. Source: Lewis et al., "BART", 2.2.

    Args:
        noises: names of the above, which follow each other in this order.
        masked: the part of the tokens that infilling takes.
        deleted: the part that deletion takes.
        others: as Objective has them.

    Raises:
        InputError: a name is none of the above, a part is not between 0 and 1.
    """

    decoder_start = EOS

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        *,
        noises: Sequence[str] = ("permutation", "infilling"),
        masked: float = 0.3,
        deleted: float = 0.15,
        **options,
    ):
        super().__init__(texts, tokenizer, **options)
        if not set(noises) <= set(NOISES):
            raise InputError(f"Denoising: noises = {list(noises)} are not of {NOISES}")
        if not (0 < masked < 1 and 0 < deleted < 1):
            raise InputError(f"Denoising: masked = {masked} or deleted = {deleted} is not between 0 and 1")
        self.noises = [getattr(self, name) for name in noises]
        self.masked, self.deleted = masked, deleted
        self.mask = token_id(tokenizer, MASK)
        self.words = Words(tokenizer)
        self.segments = Segments.of(texts, tokenizer, self.max_length - 3).tokens  # <s>, </s>, a span of none

    def lengths(self) -> np.ndarray:
        return 2 * self.segments.lengths + 4

    def example(self, index: int, epoch: int) -> Example:
        random, text = self.generator(index, epoch), self.segments[index]
        with_mask = np.append(text, self.mask)  # at place -1
        places = np.arange(len(text))  # in the text, of what noise leaves
        for noise in self.noises:
            places = np.append(places, -1)[noise(random, with_mask[places])]
        source = np.concatenate([[self.bos], with_mask[places], [self.eos]])
        hidden = ~np.isin(np.arange(len(text)), places)
        return dict(source=source, target=np.append(text, self.eos), hidden=np.append(hidden, False))

    # Noises: places of `tokens` in their new order, -1 for a <mask>.

    def permutation(self, random: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        ends = np.cumsum([len(sentence) for sentence in self.words.sentences(tokens)])
        sentences = np.split(np.arange(len(tokens)), ends[:-1])
        return np.concatenate([sentences[i] for i in random.permutation(len(sentences))])

    def rotation(self, random: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        return np.roll(np.arange(len(tokens)), -random.integers(len(tokens)))

    def deletion(self, random: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        count = min(round(self.deleted * len(tokens)), len(tokens) - 1)
        return np.delete(np.arange(len(tokens)), random.choice(len(tokens), count, replace=False))

    def infilling(self, random: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
        spans = self.spans(random, len(tokens))
        kept = len(tokens) - spans.sum()
        gaps = np.sort(random.choice(kept + 1, min(len(spans), kept + 1), replace=False))
        spans = spans[: len(gaps)]
        begins = gaps + spans.cumsum() - spans
        taken = np.zeros(len(tokens) + 1, np.int64)
        np.add.at(taken, begins, 1)
        np.add.at(taken, begins + spans, -1)
        return np.insert(np.flatnonzero(taken[:-1].cumsum() == 0), gaps, -1)

    def spans(self, random: np.random.Generator, length: int) -> np.ndarray:
        """Lengths of spans, together `masked` of the tokens; those of 0 make the text longer by 1 at most."""
        count = max(1, round(self.masked * length))
        spans = random.poisson(SPAN, count)
        spans = np.diff(np.minimum(spans.cumsum(), count), prepend=0)
        last = np.searchsorted(spans.cumsum(), count) + 1  # what is left of them has no tokens
        spans = spans[:last]
        surplus = len(spans) - (spans.sum() + 1)
        return np.delete(spans, np.flatnonzero(spans == 0)[: max(0, surplus)])
