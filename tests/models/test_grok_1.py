"""Grok-1 beside a plain float64 model written after the published code: transformers has none."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import warpformer as wf

from .checkpoints import padded_batch, same

CONFIG = dict(
    model_type="grok-1",
    architectures=["Grok1ForCausalLM"],
    vocab_size=97,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=64,
    attn_output_multiplier=0.6,
    max_attn_value=2.0,
    embedding_multiplier_scale=6.5,
    output_multiplier_scale=0.57735,
    rms_norm_eps=1e-5,
    num_experts=8,
    num_experts_per_tok=2,
    tie_word_embeddings=True,
)
WIDTH, HEADS, GROUPS, DIM = 48, 6, 2, 8


def tensors():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    state = {"model.embed_tokens.weight": draw(97, WIDTH), "model.norm.scale": 1 + draw(WIDTH)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        for name in ("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"):
            state[f"{at}.{name}.scale"] = 1 + draw(WIDTH)
        for name, rows in (("q", HEADS * DIM), ("k", GROUPS * DIM), ("v", GROUPS * DIM)):
            state[f"{at}.attn.{name}_proj.weight"] = draw(rows, WIDTH)
        state[f"{at}.attn.o_proj.weight"] = draw(WIDTH, HEADS * DIM)
        state[f"{at}.moe_block.gate.weight"] = 3 * draw(8, WIDTH)
        for expert in range(8):
            for name, shape in (
                ("linear", (40, WIDTH)),
                ("linear_v", (40, WIDTH)),
                ("linear_1", (WIDTH, 40)),
            ):
                state[f"{at}.moe_block.experts.{expert}.{name}.weight"] = draw(*shape)
    return state


def reference(state, ids):
    """Logits [T, V] of one sequence."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.scale"]

    def rotate(x):  # [T, heads, D]
        angles = torch.arange(len(x)).double()[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def attention(x, at):
        q, k, v = ((x @ w[f"{at}.{name}_proj.weight"].T).unflatten(-1, (-1, DIM)) for name in "qkv")
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (rotate(k), v))
        logits = torch.einsum("thd,shd->hts", rotate(q), k) * 0.6
        logits = 2 * torch.tanh(logits / 2)
        hidden = torch.ones(len(x), len(x)).triu(1).bool()
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,shd->thd", weights, v).flatten(1) @ w[f"{at}.o_proj.weight"].T

    def mixture(x, at):
        chosen, experts = (x @ w[f"{at}.gate.weight"].T).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for row in range(len(x)):
            for weight, expert in zip(chosen[row], experts[row].tolist(), strict=True):
                up, v, down = (
                    w[f"{at}.experts.{expert}.{n}.weight"] for n in ("linear", "linear_v", "linear_1")
                )
                gate = nn.functional.gelu(up @ x[row], approximate="tanh")
                out[row] += weight * (down @ (gate * (v @ x[row])))
        return out

    x = 6.5 * w["model.embed_tokens.weight"][ids]
    for layer in range(2):
        at = f"model.layers.{layer}"
        x = x + norm(attention(norm(x, f"{at}.pre_attn_norm"), f"{at}.attn"), f"{at}.post_attn_norm")
        x = x + norm(mixture(norm(x, f"{at}.pre_moe_norm"), f"{at}.moe_block"), f"{at}.post_moe_norm")
    return 0.57735 * norm(x, "model.norm") @ w["model.embed_tokens.weight"].T


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grok")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    return folder


@torch.no_grad()
def test_logits(folder):
    ids, mask = padded_batch()
    model = wf.load(folder)
    found = model(ids, mask)
    for row, kept in enumerate(mask.bool()):
        same(found[row, kept], reference(tensors(), ids[row, kept]), 2e-4)


@torch.no_grad()
def test_cached_decoding(folder):
    ids, mask = padded_batch()
    model = wf.load(folder)
    cache = model.make_cache()
    found = [model(ids[:, :9], mask[:, :9], cache=cache)]
    found += [model(ids[:, i : i + 1], mask[:, : i + 1], cache=cache) for i in range(9, 21)]
    same(torch.cat(found, 1), model(ids, mask), 2e-5)


def test_the_published_sizes():
    """314 billion parameters, without any memory."""
    from warpformer.models import grok_1

    config = grok_1.Config(
        vocab_size=131072,
        hidden_size=6144,
        intermediate_size=32768,
        num_hidden_layers=64,
        num_attention_heads=48,
    )
    with torch.device("meta"):
        model = grok_1.ScaledLM(grok_1.Model(config), config)
    count = sum(p.numel() for p in model.parameters())
    assert 313e9 < count < 317e9
    attention = model.backbone.layers[0].attention
    assert attention.options["scale"] == pytest.approx(0.0883883, rel=1e-5)
    assert attention.options["softcap"] == 30.0
    assert model.backbone.embedding_scale == pytest.approx(78.3837, rel=1e-5)
    assert model.logit_scale == pytest.approx(0.57735, rel=1e-5)


@torch.no_grad()
def test_save(folder, tmp_path):
    wf.save(wf.load(folder), tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
