import pytest
import torch
import torch.nn.functional as F
from torch import nn

from warpformer import ops
from warpformer.models import transformer
from warpformer.nn.embedding import sinusoidal_positions

LAYERS, WIDTH, HEADS, HIDDEN, VOCABULARY, DROPOUT, SMOOTHING = 3, 256, 4, 1024, 8000, 0.1, 0.1
BATCH, SHORTEST, LONGEST = 100, 34, 46  # tokens, of source and target: those of a batch by length


class TorchTransformer(nn.Module):
    """The same of torch.nn, which pads."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.tokens.weight, std=WIDTH**-0.5)
        self.layers = nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, HIDDEN, DROPOUT, batch_first=True)
        self.dropout = nn.Dropout(DROPOUT)
        self.register_buffer("positions", sinusoidal_positions(LONGEST, WIDTH))

    def embed(self, ids):
        return self.dropout(self.tokens(ids) * WIDTH**0.5 + self.positions[: ids.shape[1]])

    def loss(self, source, source_there, target, there, labels):
        causal = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
        hidden = self.layers(
            self.embed(source),
            self.embed(target),
            tgt_mask=causal,
            tgt_is_causal=True,
            src_key_padding_mask=~source_there,
            tgt_key_padding_mask=~there,
            memory_key_padding_mask=~source_there,
        )
        logits = F.linear(hidden[there], self.tokens.weight)
        return F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)


def ours():
    sizes = dict(d_model=WIDTH, dropout=DROPOUT, vocab_size=VOCABULARY, final_norm=True)
    for stack in ("encoder", "decoder"):
        sizes |= {f"{stack}_{name}": n for name, n in layer_sizes().items()}
    config = transformer.Config(**sizes)
    model = transformer.ConditionalGeneration(transformer.Model(config), config)

    def loss(source, source_there, target, there, labels):
        rows, _ = model.backbone.forward_rows(source, source_there, target, there)
        return ops.cross_entropy(model.logits(rows), labels, label_smoothing=SMOOTHING)

    return step(model, loss)


def layer_sizes():
    return {"layers": LAYERS, "ffn_dim": HIDDEN, "attention_heads": HEADS}


def torch_nn():
    model = TorchTransformer()
    return step(model, model.loss)


def step(model, loss):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def function(dtype, *batch):
        with torch.inference_mode(False), torch.enable_grad():
            batch = [t.clone() for t in batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                value = loss(*batch)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return value.detach()

    return function


def batch():
    lengths = torch.randint(SHORTEST, LONGEST + 1, (2, BATCH, 1))
    there = torch.arange(LONGEST) < lengths
    source, target = torch.randint(VOCABULARY, there.shape)
    return source, there[0], target, there[1], torch.randint(VOCABULARY, (int(there[1].sum()),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def bench_translation(compare, dtype):
    """Forward, backward, clipping and AdamW; bfloat16 is that of autocast."""
    with torch.inference_mode(False):
        steps = {"ours": ours(), "torch": torch_nn()}
    own = WIDTH * (4 * WIDTH + 2 * HIDDEN)
    weights = LAYERS * (2 * own + 4 * WIDTH * WIDTH) + VOCABULARY * WIDTH
    compare(
        f"{LAYERS} + {LAYERS} layers of {WIDTH}, {VOCABULARY} words, {BATCH} pairs of about 40 tokens",
        dtype=dtype,
        inputs=batch,
        ours=lambda *args: steps["ours"](dtype, *args),
        peers={"torch": lambda *args: steps["torch"](dtype, *args)},
        moved=weights * 4 * 8,
        flops=6 * weights * BATCH * (SHORTEST + LONGEST) // 2,
    )
