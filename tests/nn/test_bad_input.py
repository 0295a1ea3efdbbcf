"""What a layer cannot take is an InputError or a TypeError."""

import pytest
import torch

from tests.check import raw_errors
from tests.samples import Sample
from warpformer import nn

x = torch.zeros(2, 5, 16)
masks = torch.zeros(5, 5), torch.zeros(2, 5, dtype=torch.bool)
layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
LAYERS = {
    "MultiheadAttention": Sample(nn.MultiheadAttention(16, 4, batch_first=True), (x, x, x)),
    "TransformerEncoderLayer": Sample(layer, (x, *masks)),
    "TransformerEncoder": Sample(nn.TransformerEncoder(layer, 1), (x, *masks)),
    "Linear": Sample(nn.Linear(16, 8), (x,)),
    "PackedLinear": Sample(nn.Linear(16, 8).to_packed(), (x,)),
    "LayerNorm": Sample(nn.LayerNorm(16), (x,)),
    "RMSNorm": Sample(nn.RMSNorm(16), (x,)),
    "Dropout": Sample(nn.Dropout(), (x,)),
    "Embedding": Sample(nn.Embedding(7, 16), (torch.zeros(2, 5, dtype=torch.int64),)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_one_odd_argument(name, training):
    module = LAYERS[name].op.train(training)
    with torch.set_grad_enabled(training):
        assert raw_errors(Sample(module.forward, LAYERS[name].args)) == {}
