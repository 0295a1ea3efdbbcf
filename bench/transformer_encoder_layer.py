import pytest
import torch
from torch import nn

import warpformer as wf

BATCH, TOKENS, WIDTH, HEADS, HIDDEN = 8, 128, 512, 8, 2048


def layers(dtype):
    """The torch layer and ours, with the same weights."""
    with torch.inference_mode(False):
        options = {"batch_first": True, "dtype": dtype, "activation": "gelu"}
        theirs = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options)
        ours = wf.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **options)
        ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def cost(dtype):
    """Bytes and operations of one forward."""
    tokens = BATCH * TOKENS
    weights = 4 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN
    moved = (2 * tokens * WIDTH + weights) * dtype.itemsize
    return moved, 2 * tokens * weights + 4 * tokens * TOKENS * WIDTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_forward(compare, dtype):
    """In eval mode with padding: torch's fast path."""
    theirs, ours = (layer.eval() for layer in layers(dtype))
    lengths = torch.linspace(TOKENS // 4, TOKENS, BATCH).long()
    padding = torch.arange(TOKENS) >= lengths[:, None]

    def kept(layer, x):
        return layer(x, src_key_padding_mask=padding)[~padding]

    moved, flops = cost(dtype)
    compare(
        f"[{BATCH}, {TOKENS}, {WIDTH}], {HEADS} heads, ff {HIDDEN}, padding",
        dtype=dtype,
        inputs=lambda: (torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype),),
        ours=lambda x: kept(ours, x),
        peers={"torch": lambda x: kept(theirs, x)},
        moved=moved,
        flops=flops,
    )


@pytest.mark.parametrize("autocast", [False, True])
def bench_training_step(compare, autocast):
    """Forward, backward and a step of AdamW, with dropout."""
    theirs, ours = layers(torch.float32)
    with torch.inference_mode(False):
        steps = {layer: Step(layer, autocast) for layer in (theirs, ours)}
    moved, flops = cost(torch.float32)
    compare(
        f"[{BATCH}, {TOKENS}, {WIDTH}], {HEADS} heads, ff {HIDDEN}, training step"
        + (", autocast" if autocast else ""),
        dtype=torch.bfloat16 if autocast else torch.float32,
        inputs=lambda: (torch.randn(BATCH, TOKENS, WIDTH),),
        ours=steps[ours],
        peers={"torch": steps[theirs]},
        moved=3 * moved,
        flops=3 * flops,
        tolerance=0.5,  # dropout draws other numbers
    )


class Step:
    def __init__(self, layer, autocast):
        self.layer, self.autocast = layer, autocast
        self.optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5)

    def __call__(self, x):
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                out = self.layer(x.clone())
            out.square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return out.detach()
