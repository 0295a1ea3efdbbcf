"""Which tensor of a checkpoint is which of a model."""

from collections.abc import Container, Iterable, Mapping

BACKBONE = "backbone"  # of a model with a head, as its modules are named here
LEAVES = {"gamma": "weight", "beta": "bias"}  # of the first TensorFlow checkpoints


class KeyMap:
    """Names of the modules or tensors of a model here, and in checkpoints as transformers writes them.

    `*` stands for a number, a number for itself. Names of a module are those of all its tensors: "norm" for
    "norm.weight".

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
        self._written = _table((ours, _names(theirs)[0]) for ours, theirs in (backbone | head).items())
        self._backbone = _table(_inverse(backbone))
        self._head = _table(_inverse(head))

    def ours(self, key: str, names: Container[str], prefix: str | None = None) -> str | None:
        """The name here, among the `names` of a model, of the checkpoint's tensor `key`: None for one that is
        ignored or of another head, `key` itself if it is unknown."""
        *modules, leaf = key.split(".")
        key = ".".join([*modules, LEAVES.get(leaf, leaf)])
        bare = key.removeprefix((self.prefix if prefix is None else prefix) + ".")
        if _pattern(bare)[0] in self.ignored:
            return None
        backbone, head = _replace(bare, self._backbone), _replace(key, self._head)
        candidates = [f"{BACKBONE}.{name}" for name in backbone] + backbone + head
        found = [name for name in candidates if name in names]
        return found[0] if found else None if head else key

    def theirs(self, name: str, prefix: str | None = None) -> str:
        """The other way round."""
        bare = name.removeprefix(BACKBONE + ".")
        key = _replace(bare, self._written)[0]
        prefix = self.prefix if prefix is None else prefix
        return f"{prefix}.{key}" if prefix and bare != name else key

    def is_transposed(self, name: str) -> bool:
        pattern, _ = _pattern(name.removeprefix(BACKBONE + "."))
        return pattern in self.transposed or pattern.removesuffix(".weight") in self.transposed


def _names(one_or_more):
    return (one_or_more,) if isinstance(one_or_more, str) else one_or_more


def _inverse(pairs):
    return ((theirs, ours) for ours, names in pairs.items() for theirs in _names(names))


def _table(pairs):
    """Pattern of a name -> its numbers, of which some may be *, and what it stands for, of all such names."""
    found = {}
    for name, other in pairs:
        pattern, numbers = _pattern(name)
        found.setdefault(pattern, []).append((numbers, other))
    return found


def _pattern(name):
    """The name with * for its numbers, and the numbers."""
    parts = name.split(".")
    is_number = [part.isdecimal() or part == "*" for part in parts]
    pattern = ".".join("*" if number else part for part, number in zip(parts, is_number, strict=True))
    return pattern, [part for part, number in zip(parts, is_number, strict=True) if number]


def _replace(name, table):
    """What the name, or that of its module, stands for in the table."""
    pattern, numbers = _pattern(name)
    module, _, leaf = pattern.rpartition(".")
    found = [*table.get(pattern, ()), *((known, f"{other}.{leaf}") for known, other in table.get(module, ()))]
    return [_filled(other, known, numbers) for known, other in found if _is_one_of(numbers, known)]


def _is_one_of(numbers, known):
    return all(k in ("*", n) for n, k in zip(numbers, known, strict=True))


def _filled(other, known, numbers):
    """The numbers that * of the known name stood for, in the place of those of the other."""
    for number, k in zip(numbers, known, strict=True):
        other = other.replace("*", number, 1) if k == "*" else other
    return other
