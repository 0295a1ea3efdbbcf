"""What `warpformer demo` times: a sentence encoder and some layers and ops, each beside the same of torch."""

import random
import statistics
import time
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from warpformer import ops
from warpformer.embeddings import SentenceEncoder
from warpformer.nn import TransformerEncoderLayer

ROUNDS = 5


class TorchEncoder:
    """The BERT of a SentenceEncoder in torch's own layers, on their fused inference path, with mean pooling
    and batches sorted by length and padded."""

    def __init__(self, encoder: SentenceEncoder):
        model, config = encoder.model, encoder.model.config
        self.encoder = encoder
        self.tables = model.tokens, model.positions, model.token_types
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm.load_state_dict(model.norm.state_dict())
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            activation=config.hidden_act,
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
        )
        self.layers = nn.TransformerEncoder(layer, config.num_hidden_layers).eval()
        for theirs, ours in zip(self.layers.layers, model.layers, strict=True):
            theirs.self_attn.in_proj_weight.data = ours.attention.qkv.weight
            theirs.self_attn.in_proj_bias.data = ours.attention.qkv.bias.data
            theirs.self_attn.out_proj.load_state_dict(ours.attention.out.state_dict())
            theirs.norm1.load_state_dict(ours.attention_norm.state_dict())
            theirs.linear1.load_state_dict(ours.feed_forward.up.state_dict())
            theirs.linear2.load_state_dict(ours.feed_forward.down.state_dict())
            theirs.norm2.load_state_dict(ours.feed_forward_norm.state_dict())

    @torch.inference_mode()
    def encode(self, sentences: list[str], batch_size: int = 32):
        rows = torch.empty(len(sentences), self.encoder.get_embedding_dimension())
        order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
        for start in range(0, len(sentences), batch_size):
            chosen = order[start : start + batch_size]
            tokens = self.encoder.tokenizer.encode_batch([sentences[i] for i in chosen])
            ids = [torch.tensor(encoding.ids) for encoding in tokens]
            input_ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)  # [B, T]
            padding = torch.arange(input_ids.shape[1]) >= torch.tensor([len(i) for i in ids])[:, None]
            tokens, positions, types = (table.weight for table in self.tables)
            x = self.norm(tokens[input_ids] + positions[: input_ids.shape[1]] + types[0])  # [B, T, C]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls the nested tensors it makes here a prototype
                x = self.layers(x, src_key_padding_mask=padding)
            kept = (~padding)[..., None]
            rows[chosen] = F.normalize((x * kept).sum(1) / kept.sum(1), dim=1)
        return rows.numpy()


def pairs(encoder: SentenceEncoder, sentences: list[str]) -> list[tuple]:
    """Of each pair a name and two functions that do the same work, ours and torch's."""
    reference = TorchEncoder(encoder)
    sizes = dict(d_model=512, nhead=8, dim_feedforward=2048, batch_first=True)
    layers = TransformerEncoderLayer(**sizes), nn.TransformerEncoderLayer(**sizes)
    qkv = torch.randn(3, 1, 16, 1024, 64, dtype=torch.bfloat16)
    scores = torch.randn(4096, 1024)
    return [
        (
            f"all-MiniLM-L6-v2, {len(sentences)} sentences",
            lambda: encoder.encode(sentences),
            lambda: reference.encode(sentences),
        ),
        ("training step of an encoder layer", *map(_training_step, layers)),
        (
            "causal attention, bfloat16",
            lambda: ops.scaled_dot_product_attention(*qkv, is_causal=True),
            lambda: F.scaled_dot_product_attention(*qkv, is_causal=True),
        ),
        ("softmax", lambda: ops.softmax(scores), lambda: F.softmax(scores, -1)),
    ]


def _training_step(layer):
    x = torch.randn(8, 128, 512)

    @torch.enable_grad()
    def step():
        layer.zero_grad()
        layer(x).square().mean().backward()

    return step


@torch.no_grad()
def milliseconds(functions) -> list[float]:
    """Of each function the median of its calls, which alternate with the others', after one of each."""
    seconds = [[] for _ in functions]
    for _ in range(ROUNDS + 1):
        for function, of_it in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            of_it.append(time.perf_counter() - start)
    return [1e3 * statistics.median(of_it[1:]) for of_it in seconds]


def random_sentences(tokenizer, count: int) -> list[str]:
    """Sentences of 5 to 40 of the tokenizer's whole words."""
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalpha())
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(count)]
