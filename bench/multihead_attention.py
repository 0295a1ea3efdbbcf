import pytest
import torch
from torch import nn

import warpformer as wf

BATCH, TOKENS, WIDTH, HEADS = 1, 1024, 512, 8


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def bench_causal(compare, dtype, need_weights):
    """Self-attention with a causal mask, in eval mode."""
    with torch.inference_mode(False):
        theirs = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=dtype).eval()
        ours = wf.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=dtype).eval()
        ours.load_state_dict(theirs.state_dict())
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=dtype)
    options = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    x = BATCH * TOKENS * WIDTH
    products = 2 * BATCH * TOKENS * 4 * WIDTH * WIDTH
    attention = 4 * BATCH * TOKENS * TOKENS * WIDTH // (1 if need_weights else 2)
    compare(
        f"[{BATCH}, {TOKENS}, {WIDTH}], {HEADS} heads, causal" + (", need_weights" if need_weights else ""),
        dtype=dtype,
        inputs=lambda: (torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype),),
        ours=lambda x: ours(x, x, x, **options)[0],
        peers={"torch": lambda x: theirs(x, x, x, **options)[0]},
        moved=(2 * x + 4 * WIDTH * WIDTH) * dtype.itemsize,
        flops=products + attention,
    )
