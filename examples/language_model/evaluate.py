"""The perplexity of a language model on texts, in float32, bfloat16, int8 and int4.

    python examples/language_model/evaluate.py build/language_model examples/data/bible.en-es.test.tsv

MODEL is what `warpformer train` made, from whose float32 all rows are; or what `warpformer quantize` made of
that, which has the one row of its own format. A token is predicted from those before it in a window, which
moves on by half of it: each token counts once, with more than window / 2 tokens before it or, at the
beginning of the text, all. Lines of a file of columns are one text, with line breaks between.
"""

import argparse
import time

import torch

import warpformer as wf
from warpformer.checkpoint import find_checkpoint, open_tokenizer, read_json
from warpformer.scoring import perplexity
from warpformer.training import read_texts

FORMATS = {
    "float32": dict(dtype=torch.float32),
    "bfloat16": dict(dtype=torch.bfloat16),
    "int8": dict(dtype=torch.float32, quantization="int8"),
    "int4, group 32": dict(dtype=torch.float32, quantization=dict(mode="int4", group_size=32, clip="mse")),
}


def formats_of(folder) -> dict[str, dict]:
    """Name of each row -> how to load the model."""
    stored = read_json(folder / "config.json").get("quantization_config")
    if stored is None:
        return FORMATS
    names = {f"{group['format']}, group {group['group_size']}" for group in stored["groups"]}
    return {f"{' and '.join(sorted(names))}, as stored": {}}


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=find_checkpoint, help="its folder")
    parser.add_argument("test", help="a file of text")
    parser.add_argument("--column", type=int, default=1, help="of tab-separated ones; -1: lines of text")
    parser.add_argument("--window", type=int, default=512)
    return parser.parse_args()


def main():
    options = parse()
    tokenizer = open_tokenizer(options.model)
    texts = read_texts(options.test, None if options.column < 0 else [options.column])
    print("| | perplexity of a token | to the first | bits a byte | seconds |\n|---|---|---|---|---|")
    first = None
    for name, how in formats_of(options.model).items():
        model = wf.load(options.model, **how)
        start = time.perf_counter()
        found = perplexity(model, tokenizer, texts, window=options.window)
        seconds = time.perf_counter() - start
        first = first or found.perplexity
        of_token = f"{found.perplexity:.3f} | {found.perplexity / first - 1:+.2%}"
        print(f"| {name} | {of_token} | {found.bits_per_byte:.4f} | {seconds:.1f} |", flush=True)
    seconds = read_json(options.model / "train.json")["result"]["progress"]["seconds"]
    print(f"\ntrained for {seconds / 60:.0f} minutes")
    print(f"\n{found.tokens} tokens, {found.bytes} bytes; windows of {options.window}")


if __name__ == "__main__":
    main()
