"""A Hugging Face model on our kernels, then in fewer bits: what becomes of its logits, and how fast it is.

    pip install 'warpformer[examples]'
    python examples/hugging_face.py            # a small Llama with random weights
    python examples/hugging_face.py MODEL      # a folder or hub id of a causal language model of transformers

Without MODEL nothing is downloaded.
"""

import argparse
from statistics import median
from time import perf_counter

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import warpformer as wf


def small_llama(width: int, layers: int):
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
    )
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def run(model, ids, new_tokens):
    """Logits of the prompt, greedy tokens after it, and the seconds of each."""
    seconds = []
    for _ in range(3):
        start = perf_counter()
        logits = model(ids).logits
        seconds.append(perf_counter() - start)
    start = perf_counter()
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    return logits, tokens[:, ids.shape[1] :], median(seconds), perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder or hub id; else a small Llama with random weights")
    parser.add_argument("--to", default="int8", help="mode of wf.quantize_")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)

    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        model = small_llama(options.width, options.layers)
    model.eval()
    ids = torch.randint(model.config.vocab_size, (1, options.prompt))

    results = {"transformers": run(model, ids, options.new_tokens)}
    print(wf.patch_(model))
    results["patched"] = run(model, ids, options.new_tokens)
    wf.quantize_(model, options.to)
    results[options.to] = run(model, ids, options.new_tokens)

    exact, tokens, *_ = results["transformers"]
    print(f"{'':14}{'logits differ by':>18}{'same tokens':>14}{'prompt, ms':>12}{'tokens/s':>10}")
    for name, (logits, own_tokens, prompt, decoding) in results.items():
        difference = ((logits - exact).norm() / exact.norm()).item()
        same = (own_tokens == tokens).float().mean().item()
        speed = tokens.numel() / decoding
        print(f"{name:14}{difference:18.1e}{same:14.0%}{1e3 * prompt:12.1f}{speed:10.1f}")


if __name__ == "__main__":
    main()
