"""Requests of unequal lengths, all there from the first: through the engine, and in batches as they come."""

import random

import torch

import warpformer as wf
from warpformer.models import llama

REQUESTS, BATCH, VOCABULARY = 64, 8, 8000


def bench_requests(compare):
    torch.manual_seed(0)
    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8)
    with torch.inference_mode(False):
        config = llama.Config(vocab_size=VOCABULARY, **sizes)
        model = llama.CausalLM(llama.Model(config), config).to(torch.bfloat16).eval()
    wf.nn.repack_(model)
    rng = random.Random(0)
    lengths = [(rng.randrange(4, 128), rng.randrange(4, 96)) for _ in range(REQUESTS)]
    weights = sum(parameter.numel() for parameter in model.parameters())

    def prompts():
        return [torch.randint(VOCABULARY, (length,)) for length, _ in lengths]

    def through_the_engine(*prompts):
        with wf.Engine(model, max_batch=BATCH) as engine:
            requests = [
                engine.submit(prompt, max_new_tokens=new, eos_token_id=None)
                for prompt, (_, new) in zip(prompts, lengths, strict=True)
            ]
            return torch.tensor([token for request in requests for token in request.result().tokens])

    def in_batches(*prompts):
        """Of each as many as the longest of its batch needs; what is too much is thrown away."""
        tokens = []
        for start in range(0, REQUESTS, BATCH):
            chosen, sizes = prompts[start : start + BATCH], lengths[start : start + BATCH]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([length for length, _ in sizes])[:, None]
            longest = max(new for _, new in sizes)
            found = model.generate(ids, mask, max_new_tokens=longest, eos_token_id=None)[:, ids.shape[1] :]
            tokens += [row[:new] for row, (_, new) in zip(found, sizes, strict=True)]
        return torch.cat(tokens)

    compare(
        f"{REQUESTS} requests of 4 to 127 tokens, 4 to 95 new, 6 layers of 512, {BATCH} at once",
        dtype=torch.bfloat16,
        inputs=lambda: tuple(prompts()),
        ours=through_the_engine,
        peers={"generate in batches": in_batches},
        moved=2 * weights * sum(new for _, new in lengths) // BATCH,
        flops=2 * weights * sum(length + new for length, new in lengths),
        memory="read",
        compute="bf16",
        tolerance=0,
    )
