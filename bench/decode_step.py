"""Where the time of a decoding step of a small model goes, kernels or Python:

python -m warpformer.bench.decode_step

A Llama of 6 layers and 27.7 million parameters in bfloat16, random, writes one row by `generate`. Kernels are
timed one by one, by functions in the place of those of `warpformer._C` and in recorded calls, in other runs
than those that time the step: what is left of the step is Python and torch.
"""

import contextlib
from collections import defaultdict
from statistics import median
from time import perf_counter
from unittest import mock

import torch

from warpformer import _C
from warpformer.bench.model_memory import decoder, pack_
from warpformer.load import build, model_module

PARTS = {
    "linear": ("linear",),
    "embedding": ("unpack_linear", "embedding_sum"),
    "norms": ("rms_norm",),
    "rotary positions": ("rope",),
    "cache": ("append_to_cache_", "append_positions"),
    "attention": ("cached_attention",),
    "choosing a token": ("sample",),
}
SIZES = decoder(16384, 2048, 512, 1408, 6, 8, 8, tie_word_embeddings=True)
PROMPT, STEPS, ROUNDS = 16, 128, 7
CALLS = _C.Calls
OPTIONS = {
    "greedy": {},
    "drawn": dict(do_sample=True, top_k=50, top_p=0.9, temperature=0.8, repetition_penalty=1.1, seed=0),
}


def new_model(sizes: dict = SIZES) -> torch.nn.Module:
    values = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}
    return pack_(build(model_module(values), values), torch.bfloat16).eval()


class TimedCalls:
    """What `_C.Calls` does, with the seconds that each function takes when it is called again."""

    recording: "TimedCalls | None" = None

    def __init__(self, seconds: dict[str, float]):
        self.seconds, self.calls = seconds, []

    def record(self):
        TimedCalls.recording = self

    def stop(self):
        TimedCalls.recording = None

    def first(self, name: str, function, args):
        calls = CALLS()
        calls.record()
        try:
            return function(*args)
        finally:
            calls.stop()
            self.calls.append((name, calls.run))

    def run(self):
        for name, run in self.calls:
            start = perf_counter()
            run()
            self.seconds[name] += perf_counter() - start


@contextlib.contextmanager
def timed_kernels(seconds: dict[str, float]):
    """Adds the seconds that every function of `_C` takes to `seconds`."""

    def timed(name, function):
        def call(*args):
            if TimedCalls.recording is not None:
                return TimedCalls.recording.first(name, function, args)
            start = perf_counter()
            result = function(*args)
            seconds[name] += perf_counter() - start
            return result

        return call

    functions = {name: f for name, f in vars(_C).items() if type(f).__name__ == "builtin_function_or_method"}
    timed_ones = {name: timed(name, f) for name, f in functions.items()}
    with mock.patch.multiple(_C, Calls=lambda: TimedCalls(seconds), **timed_ones):
        yield


def measure(model: torch.nn.Module, steps: int = STEPS, rounds: int = ROUNDS, **options) -> dict[str, float]:
    """Seconds of a step: "step", and of each kernel by its name; the medians."""
    ids = torch.randint(model.config.vocab_size, (1, PROMPT))

    def run(count):
        start = perf_counter()
        model.generate(ids, max_new_tokens=count, eos_token_id=None, **options)
        return perf_counter() - start

    found = []
    for _ in range(rounds + 1):
        first, seconds = defaultdict(float), defaultdict(float)
        with timed_kernels(first):
            run(1)
        with timed_kernels(seconds):
            run(1 + steps)
        kernels = {name: (value - first[name]) / steps for name, value in seconds.items()}
        found.append({"step": -(run(1) - run(1 + steps)) / steps, **kernels})
    return {name: median(each.get(name, 0.0) for each in found[1:]) for name in found[-1]}


def table(seconds: dict[str, float]) -> str:
    step = seconds["step"]
    parts = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    kernels = sum(value for name, value in seconds.items() if name != "step")
    parts["other kernels"] = kernels - sum(parts.values())
    parts |= {"Python and torch": step - kernels, "step": step}
    lines = ["| part | ms | share |", "|---|--:|--:|"]
    lines += [f"| {part} | {1e3 * value:.3f} | {value / step:.0%} |" for part, value in parts.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = new_model()
    print(f"{torch.get_num_threads()} threads, {_C.isa()}")
    for name, options in OPTIONS.items():
        print(f"\n{name}:\n\n{table(measure(model, **options))}")
