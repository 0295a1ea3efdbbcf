from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn.sequences import Sequences


class RotaryEmbedding(nn.Module):
    """Rotary positions: the angles of `warpformer.ops.rope`, and their application to queries and keys.

        forward(query, key=None, positions=None) = ops.rope(query, cos, sin, key=key, positions=positions)

    MultiheadAttention and the Transformer layers take one as `rotary=`. It has no parameters, and nothing in
    a state_dict.

    Args:
        head_dim: D.
        max_length: positions 0 to max_length - 1 have angles.
        theta: the base of the frequencies.
        scaling: rope_scaling of a Hugging Face config, as `ops.rope_frequencies` takes it.
        partial_rotary_factor: the part of a head that rotates.
        max_position_embeddings: of the config, which some scalings are relative to.
        interleaved: pairs are neighbours (GPT-J, the paper), not halves of a head (GPT-NeoX, Llama).

    Args of forward:
        query: [..., T, H, D], float32, bfloat16 or float16, any strides.
        key: [..., T, G, D].
        positions: of the tokens, broadcastable to [..., T]; 0, 1, ... T - 1 if None.

    Returns:
        The rotated query; with `key` a pair.

    Raises:
        InputError: as ops.rope and ops.rope_frequencies.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding".
    """

    def __init__(
        self,
        head_dim: int,
        max_length: int = 2048,
        *,
        theta: float = 10000.0,
        scaling: Mapping | None = None,
        partial_rotary_factor: float = 1.0,
        max_position_embeddings: int | None = None,
        interleaved: bool = False,
        device=None,
    ):
        super().__init__()
        self.interleaved = interleaved
        self.max_length = max_length
        self._frequencies = dict(
            head_dim=head_dim,
            scaling=scaling,
            theta=theta,
            partial_rotary_factor=partial_rotary_factor,
            max_position_embeddings=max_position_embeddings,
        )
        self._longer_than, self._not_longer_than = _bounds(scaling, max_position_embeddings)
        self.init_buffers(device)

    def init_buffers(self, device=None):
        """Computes the angles: at first, and again where a model leaves the meta device."""
        lengths = [None] if self._longer_than is None else [None, self._longer_than + 1]
        tables = []
        for length in lengths:
            inv_freq, factor = ops.rope_frequencies(**self._frequencies, sequence_length=length)
            tables.append(ops.rope_tables(inv_freq, self.max_length, factor, device=device))
        for name, parts in zip(("cos", "sin"), zip(*tables, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts), persistent=False)

    def reserve(self, longest: int) -> int:
        """Has angles for sequences of so many tokens; returns for how many.

        Raises:
            InputError: with "dynamic" they are more than max_position_embeddings: the angles would change
                with every token, also of those that a cache holds.
        """
        if self._not_longer_than is not None and longest > self._not_longer_than:
            raise InputError(
                f"a sequence of {longest} tokens is longer than max_position_embeddings = "
                f"{self._not_longer_than}: beyond it rope_type 'dynamic' is not supported"
            )
        if longest > self.max_length:
            self.max_length = max(longest, 2 * self.max_length)
            self.init_buffers(self.cos.device)
        return self.max_length

    def prepare(self, sequences: Sequences) -> Sequences:
        """`sequences` with the positions that `forward` takes, once there are angles for all of them.

        With "longrope" a sequence of more tokens than the model was trained for has angles of its own; keys
        in a cache keep theirs when it grows beyond that, as in the models of transformers. Tokens that follow
        in a cache have the same angles in one call as in a call for each.

        Raises:
            InputError: as `reserve`.
        """
        self.reserve(sequences.longest)
        if self._longer_than is None:
            return sequences
        totals = sequences.cu_seqlens.diff() if sequences.totals is None else sequences.totals
        totals = sequences.of_tokens(totals)
        if not sequences.is_first:
            follows = sequences.of_tokens(sequences.held > 0)
            totals = torch.where(follows, sequences.positions + 1, totals)
        shift = (totals > self._longer_than) * self.max_length
        return replace(sequences, positions=sequences.positions + shift)

    def forward(
        self, query: Tensor, key: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        options = {"positions": positions, "interleaved": self.interleaved}
        return ops.rope(query, self.cos, self.sin, key=key, **options)

    def _apply(self, fn, recurse=True):
        """Angles move to another device, and stay float32."""
        device = fn(self.cos[:0]).device
        self.cos, self.sin = self.cos.to(device), self.sin.to(device)
        return self

    def extra_repr(self):
        return (
            f"max_length={self.max_length}, rotated={2 * self.cos.shape[1]}, interleaved={self.interleaved}"
        )


def _bounds(scaling, max_position_embeddings):
    """Beyond how many tokens "longrope" has other frequencies, and up to how many those of "dynamic" are the
    same; None for others."""
    scaling = scaling if isinstance(scaling, Mapping) else {}
    whole = scaling.get("max_position_embeddings") or max_position_embeddings
    match scaling.get("rope_type", scaling.get("type")):
        case "longrope":
            length = scaling.get("original_max_position_embeddings") or whole
            return length if isinstance(length, int) else None, None
        case "dynamic":
            return None, whole
    return None, None
