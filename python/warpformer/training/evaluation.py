"""The loss of a model on texts that it is not trained on."""

from collections.abc import Iterable

import torch
from torch import nn

from warpformer.training.batches import Batches
from warpformer.training.objectives.objective import Objective


@torch.no_grad()
def summed_loss(
    model: nn.Module, objective: Objective, batches: Iterable[list[int]], device
) -> tuple[float, int]:
    """The sum of the losses of all targets of some batches of indices, and how many targets these are."""
    total, targets = 0.0, 0
    for indices in batches:
        batch = objective.batch(indices, 0).to(device)
        total += objective.loss(model, batch).item() * batch.targets
        targets += batch.targets
    return total, targets


def mean_loss(model: nn.Module, objective: Objective, *, max_tokens: int = 4096) -> float:
    """The loss of an objective, in the mean over all its targets.

    Args:
        model: in eval mode, in float32, its linear layers quantized or not: what `warpformer.load` returns.
        objective: on the texts; without label smoothing it is the negative log-likelihood of a token.
        max_tokens: of a batch, at most.
    """
    device = next(model.parameters()).device
    total, targets = summed_loss(model, objective, Batches(objective, max_tokens).epoch(0), device)
    return total / targets
