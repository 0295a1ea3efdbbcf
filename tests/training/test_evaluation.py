import pytest
import torch

from tests.training.models import OBJECTIVES, make_model, make_objective
from warpformer.training import mean_loss


@pytest.mark.parametrize("cls", OBJECTIVES)
@torch.no_grad()
def test_mean_loss_is_that_of_all_examples_at_once(cls, pairs, english, tokenizer):
    objective = make_objective(cls, pairs, english, tokenizer)
    model = make_model(objective, tokenizer).eval()
    whole = objective.loss(model, objective.batch(range(objective.examples), 0)).item()
    for max_tokens in (300, 10_000):
        assert mean_loss(model, objective, max_tokens=max_tokens) == pytest.approx(whole, rel=1e-5)
