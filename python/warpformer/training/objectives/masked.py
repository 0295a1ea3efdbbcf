"""BERT's objectives."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.training.objectives.objective import Batch, Example, Objective, joined, pad
from warpformer.training.objectives.segments import Segments
from warpformer.training.objectives.words import Words
from warpformer.training.text import Texts
from warpformer.training.tokenizer import BOS, EOS, MASK, token_id

MASKED, REPLACED = 0.8, 0.1  # of the targets; the rest stay as they are


@dataclass
class MaskedBatch(Batch):
    """A Batch of which few rows are targets.

    Attributes:
        places: [targets] int64, their rows.
        pairs: [B] int64, 0 where the second segment follows the first, else 1; None without pairs.
        shares: [B] float32, the part of the targets that each example has.
    """

    places: Tensor
    pairs: Tensor | None
    shares: Tensor


class MaskedLM(Objective):
    """Tokens that are hidden, of all others; and whether a segment follows another.

        example: <s> A </s> B </s>        B follows A, or is any other segment, half of the time each
                 <s> A </s>               without next_sentence
        targets: fraction of the tokens of A and B; of them 80 % are <mask>, 10 % random, 10 % as they were
        loss = mean over targets of -log p(token) + mean over pairs of -log p(B follows A, or not)

    In the second mean an example counts by its targets, so that this loss, too, is the mean of those of its
    examples. Only rows of targets go through the output layer. The model is bert's PreTraining, without
    next_sentence its MaskedLM. Source: Devlin et al., "BERT", 3.1 and A.1.

    Args:
        next_sentence: whether examples are pairs.
        whole_word: whether all tokens of a word are targets, or none.
        fraction: of the tokens that are targets, rounded, at least one.
        others: as Objective has them.

    Raises:
        InputError: fraction is not in (0, 1), or no document has two segments.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        *,
        next_sentence: bool = True,
        whole_word: bool = False,
        fraction: float = 0.15,
        **options,
    ):
        super().__init__(texts, tokenizer, **options)
        if not 0 < fraction < 1:
            raise InputError(f"MaskedLM: fraction = {fraction} is not between 0 and 1")
        self.next_sentence = next_sentence
        self.fraction = fraction
        self.bos, self.eos, self.mask = (token_id(tokenizer, token) for token in (BOS, EOS, MASK))
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self.ordinary = np.array(sorted({*range(tokenizer.get_vocab_size())} - special))
        self.words = Words(tokenizer) if whole_word else None
        room = (self.max_length - 3) // 2 if next_sentence else self.max_length - 2
        segments = Segments.of(texts, tokenizer, room)
        self.segments = segments.tokens
        self.firsts = np.arange(len(self.segments))
        if next_sentence:
            self.firsts = np.flatnonzero(np.diff(segments.documents) == 0)
            alone = int((np.bincount(segments.documents) == 1).sum())
            if alone:
                self.skipped["document of one segment"] = alone
            if not len(self.firsts):
                raise InputError("MaskedLM: no document has two segments, for next_sentence")

    @property
    def token_ids(self) -> dict[str, int]:
        return dict(
            pad_token_id=self.pad, cls_token_id=self.bos, sep_token_id=self.eos, mask_token_id=self.mask
        )

    def lengths(self) -> np.ndarray:
        lengths = self.segments.lengths
        firsts = lengths[self.firsts]
        return firsts + lengths.max() + 3 if self.next_sentence else firsts + 2

    def example(self, index: int, epoch: int) -> Example:
        random = self.generator(index, epoch)
        first = int(self.firsts[index])
        segments, follows = [self.segments[first]], True
        if self.next_sentence:
            second = first + 1
            if len(self.segments) > 2 and random.random() < 0.5:
                second, follows = self.other(random, first), False
            segments.append(self.segments[second])
        pieces = [[self.bos]]
        for segment in segments:
            pieces += [segment, [self.eos]]
        tokens = np.concatenate(pieces).astype(np.int64)
        types = np.repeat(range(len(segments)), [len(s) + 1 for s in segments])
        text = np.concatenate([np.arange(len(s)) + 1 for s in segments])
        if self.next_sentence:
            text[len(segments[0]) :] += len(segments[0]) + 1
        places = self.choose(random, tokens, text)
        return dict(
            tokens=self.hidden(random, tokens, places),
            types=np.concatenate([[0], types]),
            places=places,
            labels=tokens[places],
            pair=np.array(0 if follows else 1),
        )

    def other(self, random: np.random.Generator, first: int) -> int:
        """A segment that is neither the first nor the next."""
        second = int(random.integers(len(self.segments) - 2))
        return second + 2 if second >= first else second

    def choose(self, random: np.random.Generator, tokens: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Places of the targets, in order, among those of the text."""
        count = max(1, round(self.fraction * len(text)))
        if self.words is None:
            return np.sort(random.choice(text, count, replace=False))
        starts = self.words.starts(tokens[text]) | (np.diff(text, prepend=text[0]) > 1)
        words = starts.cumsum() - 1
        order = random.permutation(words[-1] + 1)
        sizes = np.bincount(words)[order].cumsum()
        chosen = order[: max(1, np.searchsorted(sizes, count, side="right"))]
        return text[np.isin(words, chosen)]

    def hidden(self, random: np.random.Generator, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Tokens as the model sees them."""
        fate = random.random(len(places))
        replaced = (fate >= MASKED) & (fate < MASKED + REPLACED)
        tokens = tokens.copy()
        tokens[places[fate < MASKED]] = self.mask
        tokens[places[replaced]] = random.choice(self.ordinary, replaced.sum())
        return tokens

    def collate(self, examples: Sequence[Example]) -> MaskedBatch:
        tokens, there = pad([example["tokens"] for example in examples], self.pad)
        inputs = dict(input_ids=tokens, attention_mask=there)
        pairs = None
        if self.next_sentence:
            inputs["token_type_ids"] = pad([example["types"] for example in examples], 0)[0]
            pairs = torch.tensor([int(example["pair"]) for example in examples])
        lengths = np.array([len(example["tokens"]) for example in examples])
        begins = lengths.cumsum() - lengths
        places = joined([e["places"] + begin for e, begin in zip(examples, begins, strict=True)])
        labels = joined([example["labels"] for example in examples])
        counts = torch.tensor([len(example["labels"]) for example in examples])
        shares = counts / counts.sum()
        return MaskedBatch(inputs, labels, len(labels), int(lengths.sum()), places, pairs, shares)

    def losses(self, model: nn.Module, batch: MaskedBatch) -> dict[str, Tensor]:
        """The terms of the loss."""
        logits, follows = self.outputs(model, batch)
        smoothing = dict(label_smoothing=self.label_smoothing)
        losses = dict(masked_lm=ops.cross_entropy(logits, batch.labels, **smoothing))
        if follows is not None:
            terms = ops.cross_entropy(follows, batch.pairs, reduction="none")
            losses["next_sentence"] = (terms * batch.shares).sum()
        return losses

    def outputs(self, model: nn.Module, batch: MaskedBatch) -> tuple[Tensor, Tensor | None]:
        """Logits [targets, V] of the tokens, and [B, 2] of the pairs; None without these."""
        rows, sequences = model.backbone.forward_rows(**batch.inputs)
        pooled = None if batch.pairs is None else model.backbone.pool(rows, sequences)
        follows = None if pooled is None else model.next_sentence(pooled)
        return model.lm(rows[batch.places]), follows

    def logits(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        return self.outputs(model, batch)[0]

    def loss(self, model: nn.Module, batch: MaskedBatch) -> Tensor:
        return sum(self.losses(model, batch).values())
