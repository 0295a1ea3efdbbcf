import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._drop_in import drop_in
from warpformer.nn.sequences import Sequences
from warpformer.ops._arguments import require_tensor

POSITIONS = (None, "sinusoidal", "learned")


@drop_in
class Embedding(nn.Embedding):
    """torch.nn.Embedding on `warpformer.ops.embedding_sum`, with positions added in the same pass.

        forward(input, position_ids=None) = scale weight[input] + positions[position_ids]

        "sinusoidal": positions[p, 2i] = sin(p / 10000^(2i / C))    positions[p, 2i + 1] = cos(the same angle)
        "learned":    positions is a parameter, [max_length, C]

    Constructor, parameters, initialization and state_dict are torch's; learned positions are one parameter
    more, `positions`, sinusoidal ones none. Rotary positions are not added to embeddings: RotaryEmbedding.
    What torch does beside the lookup (max_norm, scale_grad_by_freq, sparse) torch does.

    Args:
        positions: None, "sinusoidal" or "learned".
        max_length: how many positions there are, with `positions`.
        scale: multiplies the rows of `weight`: sqrt(C) in "Attention Is All You Need".

    Args of forward:
        input: [..., T] int64 or int32.
        position_ids: of the tokens, broadcastable to [..., T]; 0, 1, ... T - 1 if None.

    Returns:
        [..., T, C], in the dtype of `weight`.

    Raises:
        InputError: an id or a position is outside its table; `positions` is none of the above.

    Source: torch.nn.Embedding; "Attention Is All You Need", 3.4 and 3.5; Devlin et al., "BERT" (learned).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device=None,
        dtype=None,
        *,
        positions: str | None = None,
        max_length: int = 2048,
        scale: float = 1.0,
    ):
        if positions not in POSITIONS:
            raise InputError(f"Embedding: positions = {positions!r} is none of {POSITIONS}")
        super().__init__(
            *(num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse),
            *(_weight, _freeze, device, dtype),
        )
        if positions == "learned":
            table = torch.empty(max_length, embedding_dim, device=device, dtype=dtype)
            self.positions = nn.Parameter(nn.init.normal_(table))
        elif positions == "sinusoidal":
            table = sinusoidal_positions(max_length, embedding_dim, device=device)
            self.register_buffer("positions", table.to(self.weight.dtype), persistent=False)
        if scale != 1.0:
            self.scale = scale

    def forward(self, input: Tensor, position_ids: Tensor | None = None) -> Tensor:
        positions, scale = getattr(self, "positions", None), getattr(self, "scale", 1.0)
        if positions is None and position_ids is not None:
            require_tensor("position_ids", position_ids)
            raise InputError(f"Embedding: position_ids {list(position_ids.shape)} without positions")
        if positions is not None and position_ids is None:
            position_ids = torch.arange(input.shape[-1], device=input.device)
        looks_up = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if looks_up and positions is not None and scale == 1.0:
            tables, padding = [self.weight, positions], [self.padding_idx, None]
            return ops.embedding_sum([input, position_ids], tables, padding_idx=padding)
        rows = ops.embedding(input, self.weight, self.padding_idx) if looks_up else super().forward(input)
        if positions is None:
            return rows if scale == 1.0 else rows * scale
        return torch.add(ops.embedding(position_ids, positions), rows, alpha=scale)


class SinusoidalPositions(nn.Module):
    """The positions of "Attention Is All You Need", to be added to embeddings, of as many as there are.

        forward(sequences) = table[sequences.positions],     table = sinusoidal_positions(length, C)

    It has no parameters, and nothing in a state_dict.

    Args:
        width: C.
        interleaved: sines and cosines alternate, as the paper has them; else the sines come first.
        max_length: positions there are values for at first.

    Args of forward:
        sequences: Sequences.

    Returns:
        [N, C] float32.

    Source: "Attention Is All You Need", 3.5; Junczys-Dowmunt et al., "Marian" (not interleaved).
    """

    def __init__(self, width: int, *, interleaved: bool = True, max_length: int = 512, device=None):
        super().__init__()
        self.width = width
        self.interleaved = interleaved
        self.max_length = max_length
        self.init_buffers(device)

    def init_buffers(self, device=None):
        """Computes the table: at first, and where a model leaves the meta device, on which it was built."""
        table = sinusoidal_positions(self.max_length, self.width, device=device)
        if not self.interleaved:
            table = torch.cat([table[:, ::2], table[:, 1::2]], 1)
        self.register_buffer("table", table, persistent=False)

    def reserve(self, longest: int) -> int:
        """Has values for sequences of so many tokens; returns for how many."""
        if longest > self.max_length:
            self.max_length = max(longest, 2 * self.max_length)
            self.init_buffers(self.table.device)
        return self.max_length

    def forward(self, sequences: Sequences) -> Tensor:
        self.reserve(sequences.longest)
        return ops.embedding(sequences.positions, self.table)

    def _apply(self, fn, recurse=True):
        """The table moves to another device, and stays float32."""
        self.table = self.table.to(fn(self.table[:0]).device)
        return self

    def extra_repr(self):
        return f"{self.width}, interleaved={self.interleaved}"


def sinusoidal_positions(length: int, width: int, *, device=None) -> Tensor:
    """The table [length, width] of "Attention Is All You Need", 3.5, float32, of float64 angles.

    table[p, 2i] = sin(p / 10000^(2i / width))        table[p, 2i + 1] = cos(the same angle)
    """
    inv_freq = 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64, device=device) / -width)
    cos, sin = ops.rope_tables(inv_freq, length)
    return torch.stack([sin, cos], -1).flatten(-2)[:, :width]
