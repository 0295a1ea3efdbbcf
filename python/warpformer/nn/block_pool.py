import numpy as np

from warpformer._C import InputError

FIRST = 8  # blocks, at first


class CacheFull(InputError):
    """A cache has no room for the tokens of a call. Nothing has changed: other sequences may be dropped, and
    the call made again."""


class BlockPool:
    """The blocks that sequences keep their tokens in: which are free, and how many sequences share each.

    Block 0 is nobody's: what a window has passed is written there, and never read.

    Args:
        block_size: slots of a block.
        max_blocks: there are never more; None: no limit. Their number doubles whenever all are in use.

    Attributes:
        capacity: blocks that there is memory for, block 0 among them.
        users: [capacity] int64, sequences that share a block, on the host.

    Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
    (2023), 4.
    """

    def __init__(self, block_size: int, max_blocks: int | None = None):
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.users = np.zeros(1, np.int64)
        self._free: list[int] = []  # the next one last

    @property
    def capacity(self) -> int:
        return len(self.users)

    @property
    def used(self) -> int:
        """Blocks that sequences hold, each counted once."""
        return self.capacity - 1 - len(self._free)

    @property
    def left(self) -> int | None:
        """Blocks that can still be had; None: any number."""
        return None if self.max_blocks is None else self.max_blocks - self.used

    def allocate(self, count: int) -> list[int]:
        """So many blocks, of one sequence each. There are so many `left`."""
        if count > len(self._free):
            self.reserve(max(FIRST, 2 * (self.capacity - 1), self.used + count))
        blocks = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        self.users[blocks] = 1
        return blocks

    def share(self, blocks: np.ndarray):
        """Each has a sequence more, as often as it is named; block 0 is passed over."""
        self._count(self._named(blocks))

    def release(self, blocks: np.ndarray):
        """Each has a sequence less; those that have none are free."""
        self._count(-self._named(blocks))

    def exchange(self, old: np.ndarray, new: np.ndarray):
        """Shares the new ones, and releases the old."""
        self._count(self._named(new) - self._named(old))

    def reserve(self, blocks: int):
        """Has so many in all, or as many as there may be."""
        capacity = 1 + (blocks if self.max_blocks is None else min(blocks, self.max_blocks))
        self._free = [*range(capacity - 1, self.capacity - 1, -1), *self._free]
        self.users = np.pad(self.users, (0, capacity - self.capacity))

    def _named(self, blocks):
        return np.bincount(blocks.ravel(), minlength=self.capacity)

    def _count(self, more):
        self.users += more
        self.users[0] = 0
        more[0] = 0
        self._free.extend(((self.users == 0) & (more < 0)).nonzero()[0][::-1].tolist())
