"""A Llama of TinyLlama's shape, 1.1 billion random parameters: the last token's logits of a prompt, and of
a token more."""

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import warpformer as wf
from warpformer.bench import roofline

REST_SECONDS = 0.05  # llama.cpp has threads of its own, which spin on after their work
VOCABULARY = 32000
HELD = 128  # tokens in the cache while decoding
DECODED = [("bf16", 1), ("int8", 1), ("int4", 1), ("int4_dynamic", 1), ("int4_dynamic", 8)]
if roofline.on_gpu():
    DECODED = [("bf16", 1), ("bf16", 16), ("int4", 1), ("int4", 16)]
TINY_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def checkpoint():
    """The folder of the model in bfloat16, and transformers' model of it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # one is enough
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        with torch.inference_mode(False):
            model = LlamaForCausalLM._from_config(LlamaConfig(**TINY_LLAMA), dtype=torch.bfloat16)
        model.eval().save_pretrained(folder)
        yield Path(folder), model


@pytest.mark.parametrize("tokens", [64, 512])
def bench_bfloat16(compare, checkpoint, tokens):
    folder, theirs = checkpoint
    ours = loaded(folder)
    moved, flops = cost(ours, tokens, 16)
    compare(
        f"TinyLlama-1.1B, {tokens} tokens",
        dtype=torch.bfloat16,
        inputs=lambda: (torch.randint(VOCABULARY, (1, tokens)),),
        ours=lambda ids: ours(ids, logits_to_keep=1)[0],
        peers={"transformers": lambda ids: theirs(ids, logits_to_keep=1, use_cache=False).logits[0]},
        moved=moved,
        flops=flops,
        graph=False,
        tolerance=0.05,  # both round to bfloat16 after every operation of 22 layers
    )


@pytest.mark.skipif(roofline.on_gpu(), reason="llama.cpp's numbers are for the CPU")
@pytest.mark.parametrize("tokens", [64, 512])
def bench_int4_dynamic(compare, peer, checkpoint, tmp_path, tokens):
    """Beside llama.cpp with the same 4-bit numbers, activations in 8 bits for each 32 in both."""
    ours = wf.load(checkpoint[0], quantization={"mode": "int4_dynamic", "group_size": 32})
    peers = {}
    if llama_cpp := peer("llama_cpp"):
        wf.save(ours, tmp_path / "int4")
        file = llama_cpp.write_llama(tmp_path / "int4", tmp_path / "q4_0.gguf")
        peers["llama.cpp Q4_0"] = llama_cpp.CausalLM(file, tokens)
    moved, flops = cost(ours, tokens, 4.5)
    compare(
        f"TinyLlama-1.1B, {tokens} tokens, int4_dynamic in groups of 32",
        dtype=torch.bfloat16,
        inputs=lambda: (torch.randint(VOCABULARY, (1, tokens)),),
        ours=lambda ids: ours(ids, logits_to_keep=1)[0],
        peers=peers,
        moved=moved,
        flops=flops,
        compute="int8",
        rest=REST_SECONDS if peers else 0,
        tolerance=0.1,
    )


@pytest.mark.parametrize(("format", "batch"), DECODED)
def bench_decoding(compare, peer, checkpoint, tmp_path, format, batch):
    """A token of each sequence; of the peers for one sequence, Q4_0 and Q8_0 hold the numbers of ours."""
    quantization = None if format == "bf16" else {"mode": format, "group_size": 32}
    ours = loaded(checkpoint[0], quantization)
    prompt = torch.randint(VOCABULARY, (batch, HELD))
    cache = ours.make_cache()
    cache.record_()  # as `generate` does
    ours(prompt, cache=cache, logits_to_keep=1)

    def step(ids):
        logits = ours(ids, cache=cache, logits_to_keep=1)[:, -1]
        cache.rewind_(1)
        return logits

    peers, on_gpu = {}, roofline.on_gpu()
    if on_gpu and format == "bf16" and (transformers := peer("transformers")):
        peers["transformers, compiled"] = transformers.Decoder(checkpoint[1], prompt)
    if not on_gpu and format != "bf16" and batch == 1 and (llama_cpp := peer("llama_cpp")):
        wf.save(ours, tmp_path / format)
        file = llama_cpp.write_llama(tmp_path / format, tmp_path / "model.gguf")
        peers[f"llama.cpp {'Q8_0' if format == 'int8' else 'Q4_0'}"] = llama_cpp.Decoder(file, prompt)
    weights = sum(module.packed.nbytes for module in ours.modules() if hasattr(module, "packed_weight"))
    _, flops = cost(ours, batch, 16)
    name = format if format == "bf16" else f"{format} in groups of 32"
    compare(
        f"TinyLlama-1.1B, a token behind {HELD}, batch {batch}, {name}",
        dtype=torch.bfloat16,
        inputs=lambda: (torch.randint(VOCABULARY, (batch, 1)),),
        ours=step,
        peers=peers,
        moved=weights + cache.memory().held,
        flops=flops,
        memory="copy" if on_gpu else "read",
        compute="int8" if format == "int4_dynamic" else "bf16",
        rest=REST_SECONDS if peers and not on_gpu else 0,
        graph=False,  # each has its own
        tolerance=0.1,
    )


@pytest.mark.parametrize("tokens", [64, 512])
@pytest.mark.parametrize("format", ["bf16", "int4_dynamic"])
def bench_linears(compare, checkpoint, tokens, format):
    """The linears of the layers alone, one after the other."""
    quantization = {"mode": format, "group_size": 32} if format == "int4_dynamic" else None
    layers = loaded(checkpoint[0], quantization).backbone.layers
    linears = [module for module in layers.modules() if hasattr(module, "packed_weight")]
    widths = sorted({linear.in_features for linear in linears})
    flops = 2 * tokens * sum(weights_of(linear) for linear in linears)

    def ours(*rows):
        for linear in linears:
            y = linear(rows[widths.index(linear.in_features)])
        return y

    compare(
        f"TinyLlama-1.1B, {tokens} tokens, linears of the layers {format}",
        dtype=torch.bfloat16,
        inputs=lambda: tuple(torch.randn(tokens, width, dtype=torch.bfloat16) for width in widths),
        ours=ours,
        peers={},
        moved=sum(linear.packed.nbytes for linear in linears),
        flops=flops,
        compute="bf16" if format == "bf16" else "int8",
    )


def loaded(folder: Path, quantization=None) -> nn.Module:
    return wf.load(folder, device=torch.get_default_device(), quantization=quantization)


def weights_of(linear: nn.Module) -> int:
    return linear.in_features * linear.out_features


def cost(model, tokens, bits):
    """(bytes, operations): every weight of the layers once; their matrix products and those of attention."""
    weights = sum(weights_of(module) for module in model.modules() if hasattr(module, "packed_weight"))
    head = weights_of(model.lm_head)
    scores = 2 * tokens**2 * model.config.hidden_size * model.config.num_hidden_layers  # causal: half of 4
    return int(weights * bits / 8), 2 * tokens * (weights - head) + 2 * head + scores
