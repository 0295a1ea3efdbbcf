import torch
from torch import nn

import warpformer as wf

LAYERS, BATCH, TOKENS, MEMORY, WIDTH, HEADS, HIDDEN = 6, 8, 128, 128, 512, 8, 2048


def bench_decoding(compare):
    """All tokens one by one: with a cache, and as torch must, each with all before it anew."""
    options = {"batch_first": True, "norm_first": True}
    with torch.inference_mode(False):
        theirs = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **options), LAYERS
        ).eval()
        layer = wf.nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, **options)
        ours = wf.nn.TransformerDecoder(layer, LAYERS).eval()
        ours.load_state_dict(theirs.state_dict())
    masks = [nn.Transformer.generate_square_subsequent_mask(n + 1) for n in range(TOKENS)]

    def decode(tokens, memory):
        cache = ours.make_cache()
        outputs = [ours(tokens[:, n : n + 1], memory, cache=cache) for n in range(TOKENS)]
        return torch.cat(outputs, 1)

    def decode_anew(tokens, memory):
        outputs = [
            theirs(tokens[:, : n + 1], memory, tgt_mask=mask, tgt_is_causal=True)[:, -1:]
            for n, mask in enumerate(masks)
        ]
        return torch.cat(outputs, 1)

    weights = LAYERS * (6 * WIDTH * WIDTH + 2 * WIDTH * HIDDEN)
    compare(
        f"{TOKENS} tokens of {BATCH} sequences, {LAYERS} layers, [{BATCH}, {MEMORY}, {WIDTH}] memory, cache",
        dtype=torch.float32,
        inputs=lambda: (torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, MEMORY, WIDTH)),
        ours=decode,
        peers={"torch without cache": decode_anew},
        moved=TOKENS * weights * 4,
        flops=TOKENS * BATCH * 2 * weights,
    )
