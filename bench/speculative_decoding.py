"""The language model of the package, greedily, behind text that it has read: by prompt lookup, and without.

What it writes behind its own text repeats that; behind a verse it repeats little, however often it is there.
"""

from itertools import cycle
from pathlib import Path

import pytest
import torch

import warpformer as wf
from warpformer.bench.sentence_encoder import TEST_SET, read_sentences
from warpformer.checkpoint import default_model, open_tokenizer

NEW = 160
OWN = 240
REPEATED = 6
VERSES = 8
LONGEST = 70  # characters of a verse


TEXTS = {
    f"{OWN} of its own": lambda model, verse: written(model, verse, OWN),
    f"a verse {REPEATED} times": lambda model, verse: verse.repeat(1, REPEATED),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("drafted", [5, 10])
def bench_prompt_lookup(compare, data, name, drafted):
    """The same tokens in fewer calls of the model."""
    folder = default_model("language_model")
    model, tokenizer = wf.load(folder), open_tokenizer(folder)
    verses = [text for text in read_sentences(Path(data) if data else TEST_SET) if len(text) <= LONGEST]
    prompts = []
    for verse in verses[:VERSES]:
        ids = torch.tensor([tokenizer.encode(verse + "\n", add_special_tokens=False).ids])
        ids, cache = TEXTS[name](model, ids), model.make_cache()
        with torch.no_grad():
            model(ids[:, :-1], cache=cache)
        prompts.append((ids, cache))
    turns = cycle(prompts)

    def greedy(ids, cache, **options):
        return written(model, ids, NEW, cache=cache.fork([0]), **options)[:, -NEW:]

    def lookup(ids, cache):
        return greedy(ids, cache, prompt_lookup_num_tokens=drafted)

    calls = calls_of(model, lambda: [lookup(*prompt) for prompt in prompts]) / len(prompts)
    weights = {name: module.packed.nbytes for name, module in packed(model)}
    row = compare(
        f"language_model int4, {NEW} tokens behind {name}, {drafted} drafted",
        dtype=torch.bfloat16,
        inputs=lambda: next(turns),
        ours=lookup,
        peers={"greedy without": greedy},
        moved=int(calls * sum(weights.values())),
        flops=2 * NEW * sum(module.in_features * module.out_features for _, module in packed(model)),
        tolerance=0,
    )
    row["note"] = f"{1e3 * NEW / row['ms']:.0f} tokens/s, {NEW / calls:.2f} tokens a call of the model"


def written(model, ids, count, **options):
    return model.generate(ids, max_new_tokens=count, eos_token_id=None, **options)


def packed(model):
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "packed_weight")]


def calls_of(model, work) -> int:
    """How often `work` calls the model."""
    count = 0

    def count_call(*_):
        nonlocal count
        count += 1

    hook = model.register_forward_hook(count_call)
    work()
    hook.remove()
    return count
