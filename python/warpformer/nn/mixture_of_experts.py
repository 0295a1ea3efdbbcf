from collections.abc import Callable

from torch import Tensor, nn

from warpformer import ops
from warpformer.nn.grouped_linear import GroupedLinear
from warpformer.nn.router import Router, Routing, load_balancing_loss, router_z_loss


class Experts(nn.Module):
    """Gated feed-forward networks, of which every row passes through a few.

        out[n] = sum_j weights[n, j] down[e](act(gate) up)
            e = expert_ids[n, j], [gate, up] = gate_up[e](x[n])

    Rows are sorted by expert, so that each of the two products reads a weight once for all of its rows. The
    sum is float32 and ascends in j: a row gives the same bits alone and in any batch.

    Args:
        num_experts, hidden_size, intermediate_size: E (up to 1024), C and F.
        activation: the name of a function of `ops.activation`; or what is called with the [M, 2F] of
            `gate_up` instead and returns [M, F], a function or a module such as ClampedSwiGLU.
        bias: of both layers.
        gate_up_parts, down_parts: `parts` of GroupedLinear, such as {"w1": F, "w3": F} and {"w2": C}.

    Attributes:
        gate_up: GroupedLinear, [E, 2F, C].
        down: GroupedLinear, [E, C, F]. Both may be a PackedGroupedLinear or a QuantizedGroupedLinear, too.

    Args of forward:
        x: [N, C], the tokens of all sequences, float32, bfloat16 or float16.
        expert_ids: [N, k], 0 to E - 1.
        weights: [N, k].

    Returns:
        [N, C], in the dtype of `x`; under torch.autocast in that of autocast. Everything but `expert_ids`
        has gradients.

    Raises:
        InputError: a shape or dtype does not fit, or an expert is none of 0 to E - 1. A GPU does not look at
            the ids: there, what such an expert gives is 0.

    Source: Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer"
    (2017); Jiang et al., "Mixtral of Experts" (2024).
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        gate_up_parts=None,
        down_parts=None,
    ):
        super().__init__()
        options = {"device": device, "dtype": dtype}
        shape = num_experts, hidden_size, 2 * intermediate_size, bias
        gated = isinstance(activation, str)
        self.gate_up = GroupedLinear(*shape, **options, gated=gated, parts=gate_up_parts)
        self.down = GroupedLinear(
            num_experts, intermediate_size, hidden_size, bias, **options, parts=down_parts
        )
        self.activation = activation

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        order, places, offsets = ops.sort_by_expert(expert_ids, self.gate_up.num_experts)
        rows = ops.spread_rows(x, order, places)
        if isinstance(self.activation, str):
            hidden = self.gate_up(rows, offsets, self.activation)
        else:
            hidden = self.activation(self.gate_up(rows, offsets))
        return ops.sum_rows(self.down(hidden, offsets), weights, order, places)


class ClampedSwiGLU(nn.Module):
    """The gate of gpt-oss, an activation for Experts.

        out = (clip(up) + 1) min(gate, limit) sigmoid(alpha min(gate, limit))      clip to [-limit, limit]

    in float32, where gate and up are the even and the odd columns of its input [..., 2F].

    Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025), and its code.
    """

    def __init__(self, alpha: float = 1.702, limit: float = 7.0):
        super().__init__()
        self.alpha, self.limit = alpha, limit

    def forward(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().unflatten(-1, (-1, 2)).unbind(-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        # silu(alpha gate) = alpha gate sigmoid(alpha gate); torch.sigmoid has other bits in another batch.
        return ops.activation(self.alpha * gate, "silu", up=(up + 1) / self.alpha).to(gate_up.dtype)

    def extra_repr(self):
        return f"alpha={self.alpha}, limit={self.limit}"


class MixtureOfExperts(nn.Module):
    """A feed-forward layer of experts that a router chooses from, token by token.

        forward(x) = experts(x, expert_ids, weights) + shared(x)      expert_ids, weights = router(x)
        forward(x, residual) = forward(x) + residual

    Args:
        router: Router, or a module that returns a Routing.
        experts: Experts, or a module with their forward.
        shared: a module that every token passes through, too.

    Attributes:
        routing: the Routing of the last forward in training mode, else None.

    Args of forward:
        x: [..., C].
        residual: [..., C], to be added.

    Returns:
        [..., C].

    Source: Fedus et al., "Switch Transformers" (2022); DeepSeek-AI, "DeepSeek-V2" (2024), for shared experts.
    """

    def __init__(self, router: Router, experts: nn.Module, shared: nn.Module | None = None):
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.routing: Routing | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        rows = x.flatten(0, -2)
        routing = self.router(rows)
        self.routing = routing if self.training else None
        out = self.experts(rows, routing.expert_ids, routing.weights).view(x.shape)
        if self.shared is not None:
            out = out + self.shared(x)
        return out if residual is None else out + residual

    def aux_loss(self, balance: float = 0.0, z: float = 0.0) -> Tensor:
        """balance load_balancing_loss + z router_z_loss of the last forward, which was in training mode."""
        if self.routing is None:
            raise RuntimeError("aux_loss: there was no forward in training mode")
        ids, _, probabilities, logits = self.routing
        losses = load_balancing_loss(probabilities, ids, logits.shape[1]), router_z_loss(logits)
        return balance * losses[0] + z * losses[1]

    def __getstate__(self):
        return self.__dict__ | {"routing": None}  # a part of a graph, which cannot be copied
