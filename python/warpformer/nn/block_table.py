import math

import numpy as np
import torch
from torch import Tensor

from warpformer._C import InputError
from warpformer.nn.block_pool import BlockPool

COLUMNS = 32  # at first: few calls of a model find other columns than the one before


class BlockTable:
    """Where the tokens of each sequence of a cache are: token j in slot j % block_size of block
    entries[b, j // block_size].

    Sequences share blocks. One that writes into a block that others read gets a copy of it first: of all that
    it holds, at most the last block, which is partly filled.

    Args:
        pool: what the blocks are from; several tables may share it.
        window: tokens before its own that a query sees, None for all. What no query will see, also after
            `block_size` tokens have been taken back, is released.

    Attributes:
        entries: [B, columns] int32, on the host; 0: no block.
    """

    def __init__(self, pool: BlockPool, window: int | None = None, entries: np.ndarray | None = None):
        self.pool = pool
        self.window = window
        self.entries = np.zeros((0, 0), np.int32) if entries is None else entries
        self.mirror = Mirror()
        self._tensor: Tensor | None = None  # None where `entries` have changed

    def tensor(self, device) -> Tensor:
        """`entries`, as the ops take them."""
        if self._tensor is None:
            self._tensor = self.mirror.show(self.entries, device)
        return self._tensor

    def sharing(self) -> int:
        """The most sequences n such that all of each n, one group after the other, have the same blocks."""
        differs = (self.entries[1:] != self.entries[:-1]).any(1)
        return math.gcd(len(self.entries), *(differs.nonzero()[0] + 1).tolist()) or 1

    def pass_by(self, held: np.ndarray):
        """Releases what lies before the window of the tokens after those that are held."""
        if self.window is None:
            return
        columns = np.arange(self.entries.shape[1])
        passed = (columns < self._first_kept(held)[:, None]) & (self.entries != 0)
        if passed.any():
            self._release(passed)

    def need(self, held: np.ndarray, totals: np.ndarray, is_first: bool) -> list[tuple[int, int]]:
        """Places of `entries` that need a block, for tokens held[b] to totals[b] - 1 of each sequence, that
        it has not yet for itself. Of the first tokens, which attend to each other, those that the window has
        passed need none."""
        size = self.pool.block_size
        first, end = held // size, -(-totals // size)
        if is_first and self.window is not None:
            first = np.maximum(first, self._first_kept(totals))
        self._widen(int(end.max()))
        users, needed = self.pool.users, []
        left: dict[int, int] = {}  # users of a shared block, once those before have their own
        for b, (begin, last) in enumerate(zip(first.tolist(), end.tolist(), strict=True)):
            for column, block in enumerate(self.entries[b, begin:last].tolist(), begin):
                if block and (sharing := left.get(block) or int(users[block])) > 1:
                    left[block] = sharing - 1  # the last one writes into the block itself
                    needed.append((b, column))
                elif not block:
                    needed.append((b, column))
        return needed

    def fill(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Gives them blocks; returns the pairs (old, new) of blocks whose tokens are to be copied."""
        copies = []
        for place, new in zip(places, self.pool.allocate(len(places)), strict=True):
            if old := int(self.entries[place]):
                copies.append((old, new))
                self.pool.users[old] -= 1  # others have it
            self.entries[place] = new
        self._changed()
        return copies

    def selected(self, index: np.ndarray) -> "BlockTable":
        """A table of the sequences index[b] of this one, which share their blocks."""
        entries = self.entries[index]
        self.pool.share(entries)
        return BlockTable(self.pool, self.window, entries)

    def select_(self, index: np.ndarray):
        """Sequence b becomes what sequence index[b] was."""
        entries = self.entries[index]
        self.pool.exchange(self.entries, entries)
        self.entries = entries
        self._changed()

    def extend_(self, other: "BlockTable"):
        """The sequences of `other` follow, which share their blocks with it."""
        self._widen(other.entries.shape[1])
        more = np.zeros((len(other.entries), self.entries.shape[1]), np.int32)
        more[:, : other.entries.shape[1]] = other.entries
        self.pool.share(more)
        self.entries = np.concatenate([self.entries, more])
        self._changed()

    def check_rewind(self, lengths: np.ndarray):
        """Refuses lengths whose next token would see what has been released."""
        if self.window is None:
            return
        size, columns = self.pool.block_size, np.arange(self.entries.shape[1])
        begin, end = np.maximum(lengths - self.window, 0) // size, -(-lengths // size)
        seen = (columns >= begin[:, None]) & (columns < end[:, None])
        gone = (seen & (self.entries == 0)).any(1).nonzero()[0]
        if len(gone):
            raise InputError(
                f"sequence {gone[0]} cannot go back to {lengths[gone[0]]} tokens: of the {self.window} that "
                f"the next one sees, some are released. {size} tokens can always be taken back"
            )

    def rewind_(self, lengths: np.ndarray):
        """Releases the blocks behind the first lengths[b] tokens."""
        behind = np.arange(self.entries.shape[1]) >= -(-lengths // self.pool.block_size)[:, None]
        self._release(behind & (self.entries != 0))

    def _first_kept(self, tokens):
        """[B]: the first column that a query after so many tokens sees, or did `block_size` tokens before."""
        return np.maximum(tokens - self.window - self.pool.block_size, 0) // self.pool.block_size

    def _release(self, where):
        self.pool.release(self.entries[where])
        self.entries[where] = 0
        self._changed()

    def _widen(self, columns):
        have = self.entries.shape[1]
        if columns > have:
            self.entries = np.pad(self.entries, ((0, 0), (0, max(columns, 2 * have, COLUMNS) - have)))
            self._changed()

    def _changed(self):
        self._tensor = None


class Mirror:
    """Numbers of the sequences of a batch on a device, in memory that stays where it is when sequences come,
    up to the most that there have been, and go.

    Attributes:
        moves: how often it has come to lie elsewhere.
    """

    def __init__(self):
        self.moves = 0
        self._rows: Tensor | None = None

    def show(self, values: np.ndarray, device) -> Tensor:
        """`values` [B, ...] as int32, in the first B rows."""
        new = torch.from_numpy(values.astype(np.int32, copy=False))
        if not self._has_room(new, device):
            have = 0 if self._rows is None else len(self._rows)
            count = len(new) if len(new) <= have else max(len(new), 2 * have)
            self._rows = torch.empty((count, *new.shape[1:]), dtype=torch.int32, device=device)
            self.moves += 1
        # Memory that is not pinned has been read when this returns.
        return self._rows[: len(new)].copy_(new, non_blocking=True)

    def _has_room(self, new, device):
        rows = self._rows
        if rows is None or rows.device != torch.device(device) or rows.shape[1:] != new.shape[1:]:
            return False
        # What is of inference mode cannot be written to elsewhere.
        return len(rows) >= len(new) and rows.is_inference() <= torch.is_inference_mode_enabled()


def release_all(tables):
    """Releases what tables of a cache hold that nobody has any more."""
    for table in tables:
        table.pool.release(table.entries)
