"""What all objectives are: examples made of texts, batches made of examples, the loss of a batch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.training.text import Texts
from warpformer.training.tokenizer import PAD, token_id

Example = dict[str, np.ndarray]


@dataclass
class Batch:
    """Examples that are computed together.

    Attributes:
        inputs: arguments of `forward_rows` of a model's backbone.
        labels: [targets] int64, tokens to predict, in the order of rows.
        targets: how many terms the mean of the loss has.
        tokens: how many the model reads, padding not counted.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    targets: int
    tokens: int

    def to(self, device) -> "Batch":
        """The batch on another device."""

        def moved(value):
            if isinstance(value, dict):
                return {name: moved(tensor) for name, tensor in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        values = {field.name: moved(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **values)


class Objective:
    """What a model is trained to do on texts.

    An example is a function of (seed, epoch, index) alone: what else was drawn, and by whom, does not matter.

    Args:
        texts: as `read_texts` returns them.
        tokenizer: with the special tokens of `train_tokenizer`.
        max_length: most tokens of a sequence that the model reads.
        seed: of all random choices, 0 to 2^63 - 1.
        label_smoothing: as in `ops.cross_entropy`; 0 to evaluate.

    Attributes:
        skipped: reason -> how much of the texts makes no example.
        token_ids: pad_token_id, eos_token_id...: the fields of config.json by which models are trained so.
    """

    columns = 1  # of the texts

    def __init__(
        self,
        texts: Texts,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ):
        width = len(texts.rows[0])
        if width != self.columns:
            raise InputError(
                f"{type(self).__name__} is trained on texts of {self.columns} columns, and these have {width}"
            )
        if not 0 <= seed < 2**63:
            raise InputError(f"{type(self).__name__}: seed = {seed} is not in [0, 2^63)")
        self.max_length = max_length
        self.seed = seed
        self.label_smoothing = label_smoothing
        self.pad = token_id(tokenizer, PAD)
        self.skipped: dict[str, int] = {}

    @property
    def examples(self) -> int:
        """How many there are in an epoch."""
        return len(self.lengths())

    @property
    def token_ids(self) -> dict[str, int]:
        raise NotImplementedError

    def lengths(self) -> np.ndarray:
        """Of each example how many tokens the model reads, at most, whatever the epoch."""
        raise NotImplementedError

    def example(self, index: int, epoch: int) -> Example:
        raise NotImplementedError

    def collate(self, examples: Sequence[Example]) -> Batch:
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the targets of a batch, float32. That of several batches is the mean of theirs,
        weighted by `targets`."""
        return ops.cross_entropy(
            self.logits(model, batch), batch.labels, label_smoothing=self.label_smoothing
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[targets, V], of the tokens to predict."""
        rows, _ = model.backbone.forward_rows(**batch.inputs)
        return model.logits(rows)

    def batch(self, indices: Sequence[int], epoch: int) -> Batch:
        return self.collate([self.example(index, epoch) for index in indices])

    def generator(self, index: int, epoch: int) -> np.random.Generator:
        return generator(self.seed, (epoch << 32) + index)


def generator(seed: int, stream: int) -> np.random.Generator:
    """Random numbers of a stream of their own. Source: Salmon et al., "Parallel Random Numbers"."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, stream], np.uint64)))


def pad(arrays: Sequence[np.ndarray], value: int) -> tuple[Tensor, Tensor]:
    """[B, T] int64 of arrays of at most T tokens, and where there are tokens, bool."""
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    there = np.arange(lengths.max())[None] < lengths[:, None]
    padded = np.full(there.shape, value, np.int64)
    padded[there] = np.concatenate(arrays)
    return torch.from_numpy(padded), torch.from_numpy(there)


def joined(arrays: Sequence[np.ndarray]) -> Tensor:
    """[N] int64."""
    return torch.from_numpy(np.concatenate(arrays).astype(np.int64))
