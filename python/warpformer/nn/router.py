from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.nn._repack import Repacking


class Routing(NamedTuple):
    """Which experts each token goes to."""

    expert_ids: Tensor  # [N, k] int64
    weights: Tensor  # [N, k] float32, what their outputs are multiplied by
    probabilities: Tensor  # [N, E] float32, the softmax over all experts
    logits: Tensor  # [N, E] float32


Selection = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class SoftmaxTopK:
    """The k largest of the softmax over all experts, of equal ones the first.

        p = softmax(logits), weights = scale p[ids], or scale p[ids] / sum p[ids] with `normalize`

    Mixtral has k = 2 and `normalize`; Grok-1 k = 2 without it; DeepSeek-V2 `scale` = routed_scaling_factor
    where topk_method is "greedy". Called with logits [N, E], float32, it returns the ids [N, k], their
    weights and all p.

    Raises:
        InputError: k is not within 1 to E.
    """

    k: int
    normalize: bool = True
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = ops.softmax(logits, -1)
        weights, ids = _largest(p, self.k)
        return ids, _scaled(weights, self), p


@dataclass(frozen=True)
class TopKSoftmax:
    """The k largest logits, of equal ones the first, and the softmax over these alone, as gpt-oss has it.

        weights = softmax(logits[ids])

    Called, and raises, as `SoftmaxTopK`.
    """

    k: int

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        largest, ids = _largest(logits, self.k)
        return ids, ops.softmax(largest, -1), ops.softmax(logits, -1)


@dataclass(frozen=True)
class GroupLimitedTopK:
    """SoftmaxTopK among the experts of the `top_groups` groups whose largest p is largest.

    The experts are `groups` groups of E / groups neighbours: DeepSeek-V2 with the topk_method
    "group_limited_greedy", n_group and topk_group, keeps a group on one device.

    Raises:
        InputError: E is no multiple of `groups`, or k is more than the experts of `top_groups` groups.
    """

    k: int
    groups: int
    top_groups: int
    normalize: bool = False
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        experts = logits.shape[-1]
        if experts % self.groups or self.k > experts // self.groups * self.top_groups:
            raise InputError(f"{self} does not fit {experts} experts")
        p = ops.softmax(logits, -1)
        of_groups = p.unflatten(-1, (self.groups, -1))
        _, kept = _largest(of_groups.amax(-1), self.top_groups)
        left_out = torch.ones(of_groups.shape[:-1], dtype=torch.bool, device=p.device).scatter(
            -1, kept, False
        )
        weights, ids = _largest(of_groups.masked_fill(left_out[..., None], -1.0).flatten(-2), self.k)
        return ids, _scaled(weights, self), p


def _largest(values, k):
    """The k largest of each row, and their indices, of equal values the first: torch.topk has any order."""
    if not 1 <= k <= values.shape[-1]:
        raise InputError(f"k = {k} is not within 1 to {values.shape[-1]}")
    largest, ids = ops.top_k(values.detach(), k)
    return values.gather(-1, ids) if values.requires_grad else largest, ids


def _scaled(weights, selection):
    if selection.normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights if selection.scale == 1.0 else weights * selection.scale


class Router(Repacking):
    """Chooses the experts of each token by a linear layer, whose outputs are float32 at every dtype.

        logits = x W^T + bias,  expert_ids, weights, probabilities = selection(logits)

    Args:
        hidden_size, num_experts: C and E.
        selection: SoftmaxTopK, TopKSoftmax, GroupLimitedTopK, or a function as they are.
        bias: of the linear layer.

    Attributes:
        weight: [E, C].
        bias: [E] or None.

    Args of forward:
        x: [N, C], float32, bfloat16 or float16.

    Returns:
        Routing: (expert_ids [N, k], weights [N, k], probabilities [N, E], logits [N, E]).

    Source: Shazeer et al. (2017); Fedus et al., "Switch Transformers" (2022), for float32; Jiang et al.,
    "Mixtral of Experts" (2024); DeepSeek-AI, "DeepSeek-V2" (2024).
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        selection: Selection,
        bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.selection = selection
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self):
        """As torch.nn.Linear draws them."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Routing:
        with torch.autocast(x.device.type, enabled=False):
            logits = ops.linear(x.float(), self.weight, self.bias)
            return Routing(*self.selection(logits), logits)

    def extra_repr(self):
        experts, width = self.weight.shape
        return f"{width}, {experts}, {self.selection}, bias={self.bias is not None}"


def load_balancing_loss(probabilities: Tensor, expert_ids: Tensor, num_experts: int) -> Tensor:
    """What is least where all experts get as many tokens.

        E sum_e f[e] P[e]      f[e]: of the chosen experts those that are e, for each token
                               P[e]: mean of probabilities[:, e]

    Balanced, it is k; all tokens to the same k experts with certainty, E.

    Args:
        probabilities: [N, E], the softmax over all experts.
        expert_ids: [N, k].
        num_experts: E.

    Returns:
        A scalar; f has no gradient.

    Source: Fedus et al., "Switch Transformers" (2022), equations 4 to 6; for k > 1 as Mixtral has it.
    """
    chosen = expert_ids.flatten()
    counts = probabilities.new_zeros(num_experts).scatter_add(0, chosen, probabilities.new_ones(len(chosen)))
    return num_experts * (counts / max(1, len(expert_ids)) * probabilities.mean(0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """mean (log sum_e exp logits[n, e])^2, which keeps logits [N, E] small.

    Source: Zoph et al., "ST-MoE: Designing Stable and Transferable Sparse Expert Models" (2022), equation 5.
    """
    return logits.logsumexp(-1).square().mean()
