"""T5's objective."""

import numpy as np
from tokenizers import Tokenizer

from warpformer._C import InputError
from warpformer.training.objectives.objective import Example
from warpformer.training.objectives.segments import Segments
from warpformer.training.objectives.seq2seq import TeacherForcing
from warpformer.training.text import Texts
from warpformer.training.tokenizer import PAD, sentinel, token_id


class SpanCorruption(TeacherForcing):
    """The spans that are missing in a text.

        text:   a  b1 b2  c  d1  e  ... of random spans, kept and missing in turn, the first kept
        source: a <extra_id_0> c <extra_id_1> ... </s>
        target: <extra_id_0> b1 b2 <extra_id_1> d1 ... </s>        decoder_start = <pad>

    The model is t5's ConditionalGeneration, the tokenizer one with sentinels. Source: Raffel et al.,
    "T5", 3.1.4 and 3.3.4.

    Args:
        fraction: of the tokens that are missing, rounded.
        mean_span: tokens of a missing span, in the mean.
        others: as Objective has them.

    Raises:
        InputError: fraction is not between 0 and 1, mean_span is below 1, there are fewer sentinels than
            spans, or no text has two tokens.
    """

    decoder_start = PAD

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        *,
        fraction: float = 0.15,
        mean_span: float = 3.0,
        **options,
    ):
        super().__init__(texts, tokenizer, **options)
        if not (0 < fraction < 1 and mean_span >= 1):
            raise InputError(f"SpanCorruption: fraction = {fraction}, mean_span = {mean_span} are no sizes")
        self.fraction, self.mean_span = fraction, mean_span
        self.segments = Segments.of(texts, tokenizer, self.max_length - 1).tokens
        lengths = self.segments.lengths
        self.rows = np.flatnonzero(lengths > 1)
        if len(self.rows) < len(lengths):
            self.skipped["text of one token"] = len(lengths) - len(self.rows)
        if not len(self.rows):
            raise InputError("SpanCorruption: no text has two tokens")
        _, spans = self.counts(lengths[self.rows])
        self.sentinels = np.array([token_id(tokenizer, sentinel(i)) for i in range(spans.max())])

    def counts(self, lengths):
        """How many tokens are missing of texts, and in how many spans."""
        missing = np.clip(np.rint(lengths * self.fraction).astype(np.int64), 1, lengths - 1)
        spans = np.clip(np.rint(missing / self.mean_span).astype(np.int64), 1, lengths - missing)
        return missing, spans

    def lengths(self) -> np.ndarray:
        lengths = self.segments.lengths[self.rows]
        return lengths + 2 * self.counts(lengths)[1] + 2

    def example(self, index: int, epoch: int) -> Example:
        random, text = self.generator(index, epoch), self.segments[self.rows[index]]
        missing, spans = self.counts(len(text))
        sizes = np.stack([pieces(random, len(text) - missing, spans), pieces(random, missing, spans)], 1)
        is_missing = np.tile([False, True], spans).repeat(sizes.flatten())
        ends = sizes.cumsum(0)  # of each kept and each missing span, among their like
        source = np.insert(text[~is_missing], ends[:, 0], self.sentinels[:spans])
        begins = ends[:, 1] - sizes[:, 1]
        target = np.insert(text[is_missing], begins, self.sentinels[:spans])
        hidden = np.insert(np.ones(missing, bool), begins, False)
        return dict(
            source=np.append(source, self.eos),
            target=np.append(target, self.eos),
            hidden=np.append(hidden, False),
        )


def pieces(random: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Sizes of so many pieces of `total`, none of them empty, every way of cutting it as likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
