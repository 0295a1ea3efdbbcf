import numpy as np
import torch
from torch import Tensor

from warpformer.generation.checks import require
from warpformer.nn import KVCache


class GivenCache:
    """A user's cache, which may hold the beginning of each prompt and is to hold what `generate` has read.

    The loop works on a fork, so that the cache is as before where a call raises, and the rows that leave the
    loop are set aside.

    Args:
        cache: of B sequences, or of none.
        lengths: [B] tokens of the prompts.

    Attributes:
        fork: for the loop.

    Raises:
        InputError: the cache does not fit the prompts.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, is_encoder_decoder: bool):
        require(isinstance(cache, KVCache), f"cache = {type(cache).__name__} is not a KVCache")
        batch, held, lengths = len(lengths), cache.tokens.tolist(), lengths.tolist()
        require(
            not is_encoder_decoder or not held,
            "the cache of an encoder-decoder model holds what was encoded: give one that holds nothing",
        )
        require(
            len(held) in (0, batch),
            f"the cache holds {len(held)} sequences, and there are {batch} prompts: cache.fork(index) gives "
            "each prompt a sequence",
        )
        full = [b for b, (have, all) in enumerate(zip(held, lengths, strict=False)) if have >= all]
        require(
            not full,
            f"the cache holds {held[:8]} tokens, and the prompts have {lengths[:8]}: input_ids are whole "
            f"prompts, of which the cache holds the beginning, and of rows {full[:8]} a token must be left",
        )
        self.cache = cache
        self.fork = cache.fork()
        self._rows = np.arange(batch)
        self._left: list[tuple[np.ndarray, KVCache]] = []

    def behind(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Prompts [B, T'] and their mask without what the cache holds."""
        there = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        there = there != 0
        there = there & (there.cumsum(1) > self.cache.lengths.to(there.device)[:, None])
        columns = there.any(0)
        return input_ids[:, columns], there[:, columns]

    def repeat_(self, rows: int):
        self._rows = np.arange(rows)

    def keep_(self, index: Tensor):
        """Row r of the fork becomes what row index[r] is; those that are left out have ended."""
        index = index.cpu().numpy()
        gone = np.setdiff1d(np.arange(len(self._rows)), index)
        if len(gone):
            self._left.append((self._rows[gone], self.fork.fork(gone)))
        self._rows = self._rows[index]

    def finish(self, lengths: Tensor):
        """The cache has a sequence for each row, of all its tokens but the last; `lengths` [R] are all."""
        rows = np.concatenate([*(rows for rows, _ in self._left), self._rows])
        self.cache.reorder_([])
        for part in (*(part for _, part in self._left), self.fork):
            self.cache.join_(part)
        self.cache.reorder_(rows.argsort())
        self.cache.rewind_(self.cache.tokens - lengths.cpu().numpy() + 1)
