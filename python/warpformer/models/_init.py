"""Parameters of new models."""

from torch import nn


def init_(module: nn.Module, std: float) -> None:
    """Tables and matrices of all layers are normal, of mean 0; biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            nn.init.normal_(layer.weight, std=std)
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
