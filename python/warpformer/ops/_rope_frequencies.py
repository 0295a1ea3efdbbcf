"""The angles of `rope`: frequencies as the rope_scaling of a Hugging Face config describes them."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from warpformer._C import InputError
from warpformer.ops._arguments import check_integer, check_number
from warpformer.ops._library import is_direct

ROWS = 1 << 14  # of a table computed at a time: float64 angles take twice the room of the table


def rope_frequencies(
    head_dim: int,
    scaling: Mapping | None = None,
    *,
    theta: float = 10000.0,
    partial_rotary_factor: float = 1.0,
    max_position_embeddings: int | None = None,
    sequence_length: int | None = None,
) -> tuple[Tensor, float]:
    """Rotations per position of each pair, and the factor of the tables that goes with them.

        R = int(head_dim * partial_rotary_factor)      f[i] = theta^(-2i / R)
        "default"  f
        "linear"   f / factor
        "dynamic"  f with theta (factor S / M - factor + 1)^(R / (R - 2)), S = max(sequence_length, M)
        "llama3"   f where it turns over high_freq_factor times in L positions, f / factor where under
                   low_freq_factor times, between them the mean weighted by the number of turns
        "yarn"     f where it turns over beta_fast times in L positions, f / factor where under beta_slow,
                   between them by a ramp over i; tables times
                   (0.1 mscale ln factor + 1) / (0.1 mscale_all_dim ln factor + 1)
        "longrope" f / long_factor where sequence_length > L, else f / short_factor; tables times
                   sqrt(1 + ln factor / ln L)

    Args:
        head_dim: D of a head.
        scaling: rope_scaling or rope_parameters of a config, checked as untrusted input; None is the
            default. Its rope_type (or type) is one of the above, the other fields are M =
            max_position_embeddings, L = original_max_position_embeddings (M if missing), factor (M / L
            if missing, in yarn and longrope), attention_factor (replaces the factor of the tables),
            truncate, rope_theta and partial_rotary_factor (replace the arguments) and those named above.
        theta: the base.
        partial_rotary_factor: the part of a head that rotates.
        max_position_embeddings: of the config.
        sequence_length: to be served, prompt and continuation; max_position_embeddings for "dynamic" and
            a short one for "longrope" if None.

    Returns:
        ([R/2] float64, attention factor): what `rope_tables` takes.

    Raises:
        InputError: a field is missing, of another type or out of range; R is odd or 0.
        TypeError: `head_dim` or `sequence_length` is not an int.

    Source: transformers' modeling_rope_utils (same fields, same formulas); Peng et al., "YaRN"; Ding et
    al., "LongRoPE"; Dubey et al., "The Llama 3 Herd of Models".
    """
    check_integer("rope_frequencies", "head_dim", head_dim)
    if sequence_length is not None:
        check_integer("rope_frequencies", "sequence_length", sequence_length)
    fields = _Fields({} if scaling is None else scaling)
    theta = fields.number("rope_theta", theta, above=1)
    part = fields.number("partial_rotary_factor", partial_rotary_factor, above=0)
    rotated = int(head_dim * part)
    if not 0 < rotated <= head_dim or rotated % 2:
        fields.refuse(f"head_dim = {head_dim} times partial_rotary_factor = {part} is no even part of a head")
    fields.setdefault("max_position_embeddings", max_position_embeddings)
    kind = fields.get("rope_type", fields.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        fields.refuse(f"rope_type = {kind!r} is none of: {', '.join(_KINDS)}")
    return _KINDS[kind](fields, theta, rotated, sequence_length)


def rope_tables(
    inv_freq: Tensor, length: int, attention_factor: float = 1.0, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every angle, for `rope`.

        cos[p, i] = attention_factor cos(p inv_freq[i])

    Args:
        inv_freq: [R/2], as `rope_frequencies` returns it; angles are float64 whatever its dtype.
        length: P, one more than the last position.
        attention_factor: multiplies both tables.
        device: of the tables; that of `inv_freq` if None.

    Returns:
        cos and sin, [P, R/2] float32.

    Raises:
        InputError: `inv_freq` is no floating point vector, or `length` is negative.
        TypeError: `inv_freq` is not a tensor, or another argument no number.

    Source: Su et al., "RoFormer", equation 15.
    """
    is_direct(inv_freq)  # refuses what is no tensor
    check_integer("rope_tables", "length", length)
    check_number("rope_tables", "attention_factor", attention_factor)
    attention_factor = _float(attention_factor)
    if not inv_freq.is_floating_point() or inv_freq.ndim != 1 or length < 0:
        raise InputError(
            f"rope_tables: inv_freq = {inv_freq.dtype}{list(inv_freq.shape)}, length = {length} are no "
            "frequencies and no length"
        )
    device = inv_freq.device if device is None else device
    inv_freq = inv_freq.to(device=device, dtype=torch.float64)
    cos, sin = (torch.empty(length, len(inv_freq), device=device) for _ in range(2))
    for begin in range(0, length, ROWS):
        end = min(length, begin + ROWS)
        positions = torch.arange(begin, end, dtype=torch.float64, device=device)
        angles = positions[:, None] * inv_freq
        cos[begin:end] = attention_factor * angles.cos()
        sin[begin:end] = attention_factor * angles.sin()
    return cos, sin


class _Fields(dict):
    """A rope_scaling that nobody has checked."""

    def __init__(self, scaling):
        if not isinstance(scaling, Mapping):
            self.refuse(f"scaling = {scaling!r} is no mapping")
        super().__init__({name: value for name, value in scaling.items() if value is not None})

    def setdefault(self, name, value):
        if value is not None:
            super().setdefault(name, value)

    def refuse(self, why):
        raise InputError(f"rope_frequencies: {why}")

    def number(self, name, default=None, *, above=0.0):
        """The field as a finite float > above; `default`, if there is one, where it is missing."""
        value = self.get(name, default)
        if value is None:
            self.refuse(f"{name} is missing")
        if isinstance(value, Real) and not isinstance(value, bool):
            number = _float(value)
            if above < number < math.inf:
                return number
        self.refuse(f"{name} = {value!r} is no number above {above:g}")

    def numbers(self, name, count):
        values = self.get(name)
        if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
            self.refuse(f"{name} = {values!r} is no list of {count} numbers")
        parts = _Fields({f"{name}[{i}]": value for i, value in enumerate(values)})
        return torch.tensor([parts.number(f"{name}[{i}]") for i in range(count)], dtype=torch.float64)

    def flag(self, name, default):
        value = self.get(name, default)
        return value if isinstance(value, bool) else self.refuse(f"{name} = {value!r} is no bool")

    def original_length(self):
        return self.number("original_max_position_embeddings", self.get("max_position_embeddings"), above=1)

    def extension(self):
        """factor, or the ratio of the lengths now and before."""
        if "factor" in self:
            return self.number("factor")
        return self.number("max_position_embeddings") / self.original_length()


def _float(value):
    try:
        return float(value)
    except OverflowError:  # an int beyond the floats
        return math.inf


def _plain(theta, rotated):
    return theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


def _default(fields, theta, rotated, sequence_length):
    return _plain(theta, rotated), 1.0


def _linear(fields, theta, rotated, sequence_length):
    return _plain(theta, rotated) / fields.number("factor"), 1.0


def _dynamic(fields, theta, rotated, sequence_length):
    if rotated == 2:
        fields.refuse("dynamic scaling needs more than 2 rotated elements")
    factor, trained = fields.number("factor"), fields.number("max_position_embeddings")
    length = max(sequence_length or 0, trained)
    stretch = factor * length / trained - (factor - 1)
    return _plain(theta * stretch ** (rotated / (rotated - 2)), rotated), 1.0


def _llama3(fields, theta, rotated, sequence_length):
    factor = fields.number("factor")
    low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
    if low >= high:
        fields.refuse(f"low_freq_factor = {low:g} is not below high_freq_factor = {high:g}")
    inv_freq = _plain(theta, rotated)
    turns = fields.original_length() * inv_freq / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / factor), 1.0


def _yarn(fields, theta, rotated, sequence_length):
    factor, trained = fields.extension(), fields.original_length()
    inv_freq = _plain(theta, rotated)

    def pair_that_turns(times):
        return rotated * math.log(trained / (2 * math.pi * times)) / (2 * math.log(theta))

    first = pair_that_turns(fields.number("beta_fast", 32))
    last = pair_that_turns(fields.number("beta_slow", 1))
    if fields.flag("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    width = last - first or 0.001  # a step where they coincide
    stretched = ((torch.arange(rotated // 2, dtype=torch.float64) - first) / width).clamp(0, 1)

    def magnitude(mscale):
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    if fields.get("mscale") and fields.get("mscale_all_dim"):  # 0 is as good as missing
        attention_factor = magnitude(fields.number("mscale")) / magnitude(fields.number("mscale_all_dim"))
    else:
        attention_factor = magnitude(1.0)
    return inv_freq * (1 - stretched + stretched / factor), fields.number(
        "attention_factor", attention_factor
    )


def _longrope(fields, theta, rotated, sequence_length):
    trained = fields.original_length()
    short, long = fields.numbers("short_factor", rotated // 2), fields.numbers("long_factor", rotated // 2)
    factor = fields.extension()
    attention_factor = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    divisor = long if sequence_length is not None and sequence_length > trained else short
    return _plain(theta, rotated) / divisor, fields.number("attention_factor", attention_factor)


_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
