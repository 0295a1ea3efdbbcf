from torch import nn

from warpformer.ops._kept import drop_packs


def repack_(module: nn.Module) -> nn.Module:
    """Drops the packed forms of all parameters of a module, to be made anew when they are next needed.

    Layers keep them while they do not train, and see changes that torch counts: an optimizer's step,
    load_state_dict, in-place operations. Call this after others, that is writes through `.data` or from
    outside of torch.
    """
    for parameter in module.parameters():
        drop_packs(parameter)
    return module


class Repacking(nn.Module):
    """A layer that frees packed weights when they will be stale: it goes to train, or its tensors move."""

    def train(self, mode: bool = True):
        if mode:
            repack_(self)
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        repack_(self)
        return super()._apply(fn, recurse)
