"""Which tensor of a checkpoint is which of a model."""

from collections.abc import Iterable, Mapping

BACKBONE = "backbone"  # of a model with a head, as its modules are named here
LEAVES = {"gamma": "weight", "beta": "bias"}  # of the first TensorFlow checkpoints


class KeyMap:
    """Names of the modules or tensors of a model here, and in checkpoints as transformers writes them.

    `*` stands for a number. Names of a module are those of all its tensors: "norm" for "norm.weight".

    Args:
        backbone: ours -> theirs, or several of theirs, of which the first is written.
        head: as `backbone`, of the modules beside it.
        prefix: what names of the backbone have before them in checkpoints of a model with a head.
        transposed: of ours, whose matrices lie the other way round in checkpoints.
        ignored: theirs, of tensors that a model does not need.
    """

    def __init__(
        self,
        backbone: Mapping[str, str | tuple[str, ...]],
        head: Mapping[str, str | tuple[str, ...]],
        *,
        prefix: str = "",
        transposed: Iterable[str] = (),
        ignored: Iterable[str] = (),
    ):
        self.prefix = prefix
        self.transposed = frozenset(transposed)
        self.ignored = frozenset(ignored)
        self._written = {ours: _first(theirs) for ours, theirs in (backbone | head).items()}
        self._backbone = _inverse(backbone)
        self._head = _inverse(head)

    def ours(self, key: str, with_head: bool, prefix: str | None = None) -> str | None:
        """The name here of the checkpoint's tensor `key`; `key` itself if it is unknown, None if ignored."""
        *modules, leaf = key.split(".")
        key = ".".join([*modules, LEAVES.get(leaf, leaf)])
        prefix = (self.prefix if prefix is None else prefix) + "."
        bare = key.removeprefix(prefix)
        if self._is_ignored(bare):
            return None
        name = _replace(bare, self._backbone)
        if name is not None:
            return f"{BACKBONE}.{name}" if with_head else name
        name = _replace(key, self._head)
        if name is None:
            return key
        return name if with_head else None

    def theirs(self, name: str, with_head: bool, prefix: str | None = None) -> str:
        """The other way round."""
        bare = name.removeprefix(BACKBONE + ".")
        key = _replace(bare, self._written)
        if key is None:
            raise KeyError(name)
        prefix = self.prefix if prefix is None else prefix
        return f"{prefix}.{key}" if prefix and with_head and bare != name else key

    def is_transposed(self, name: str) -> bool:
        pattern, _ = _pattern(name.removeprefix(BACKBONE + "."))
        return pattern in self.transposed or pattern.removesuffix(".weight") in self.transposed

    def _is_ignored(self, key):
        return _pattern(key)[0] in self.ignored


def _first(names):
    return names if isinstance(names, str) else names[0]


def _inverse(pairs):
    return {
        theirs: ours
        for ours, names in pairs.items()
        for theirs in ([names] if isinstance(names, str) else names)
    }


def _pattern(name):
    """The name with * for its numbers, and the numbers."""
    parts = name.split(".")
    numbers = [part for part in parts if part.isdecimal()]
    return ".".join("*" if part.isdecimal() else part for part in parts), numbers


def _replace(name, table):
    """By the entry for the whole name, or for that of its module; None if there is none."""
    pattern, numbers = _pattern(name)
    module, _, leaf = pattern.rpartition(".")
    if pattern in table:
        found = table[pattern]
    elif module in table:
        found = f"{table[module]}.{leaf}"
    else:
        return None
    for number in numbers:
        found = found.replace("*", number, 1)
    return found
