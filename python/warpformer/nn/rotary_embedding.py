from collections.abc import Mapping

from torch import Tensor, nn

from warpformer import ops


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
        interleaved: bool = False,
        device=None,
    ):
        super().__init__()
        inv_freq, factor = ops.rope_frequencies(
            head_dim, scaling, theta=theta, partial_rotary_factor=partial_rotary_factor
        )
        cos, sin = ops.rope_tables(inv_freq, max_length, factor, device=device)
        self.interleaved = interleaved
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

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
        return f"max_length={len(self.cos)}, rotated={2 * self.cos.shape[1]}, interleaved={self.interleaved}"
