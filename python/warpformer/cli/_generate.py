"""`warpformer generate | translate`."""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

import warpformer as wf
from warpformer.checkpoint import default_model, find_checkpoint, open_tokenizer, read_json
from warpformer.cli._text import INTERRUPTED, DeviceOption, fail, interruptible, read_lines
from warpformer.generation import TextStreamer
from warpformer.generation.defaults import of_model
from warpformer.generation.text_streamer import print_now

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub id of a model.", show_default="that of the package"),
]
OF_MODEL = "that of the model"  # in its generation_config.json
QuantizationOption = Annotated[
    str | None, typer.Option("--quantization", help="int8, int4...: as it is loaded.", show_default="none")
]


def generate(
    prompt: Annotated[
        str | None, typer.Option(help="The text to go on with.", show_default="standard input")
    ] = None,
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 128,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0 takes the likeliest token.", show_default="that of the model, else 0.8"
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw among so many tokens; 0 for all.", show_default=OF_MODEL)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among tokens of this probability.", show_default=OF_MODEL)
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw among tokens so likely beside the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: less of what is there already.", show_default=OF_MODEL)
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends it; may be given several times.")
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(help="A file: write JSON of this schema.", show_default="any text")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", show_default="another each time")] = None,
    quantization: QuantizationOption = None,
    device: DeviceOption = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON object when all is written, and nothing as it comes.")
    ] = False,
):
    """Prints the prompt and, as it comes, what a language model has to say after it; then, on standard error,
    tokens per second and memory. Ctrl-C ends it early."""
    if prompt is None:
        prompt = "\n".join(read_lines("-"))
    folder = find_checkpoint(model or default_model("language_model"))
    tokenizer = open_tokenizer(folder)
    network = wf.load(folder, device=device, quantization=quantization)
    if not hasattr(network, "generate") or hasattr(network, "encode"):
        fail(f"{model} is no language model but a {type(network).__name__}")
    ids = prompt_ids(prompt, tokenizer, network, folder)
    if not ids:
        fail("the prompt is empty, and the model has no token that begins a text")
    options = dict(top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty)
    options = {name: value for name, value in options.items() if value is not None}
    if temperature is None:
        temperature = network.generation_config.get("temperature", 0.8)
    options |= dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    options |= dict(max_new_tokens=max_new_tokens, num_beams=1, stop_strings=stop or None, seed=seed)
    if json_schema is not None:
        options["constraint"] = wf.Constraint.json_schema(json_schema.read_text(encoding="utf-8"), tokenizer)
    pieces: list[str] = []
    show = pieces.append if as_json else print_now
    show(prompt)
    run = TimedStreamer(TextStreamer(tokenizer, show))
    try:
        network.generate(torch.tensor([ids], device=device), streamer=run, tokenizer=tokenizer, **options)
    except KeyboardInterrupt:
        run.interrupted = True
    facts = run.facts(network)
    if as_json:
        written = {"prompt": prompt, "text": "".join(pieces[1:])}
        print(json.dumps(written | facts, ensure_ascii=False))
    else:
        print_now("\n")
        print(summary(facts), file=sys.stderr)
    if run.interrupted:
        sys.exit(INTERRUPTED)


def prompt_ids(prompt, tokenizer, model, folder) -> list[int]:
    """The tokens of a prompt, behind the one that begins a text: config.json's bos_token_id, unless
    tokenizer_config.json says that texts begin without."""
    ids, begin = tokenizer.encode(prompt).ids, of_model(model, "bos_token_id")
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    without = settings.get("add_bos_token") is False or settings.get("bos_token", "") is None
    return ids if begin is None or without or ids[:1] == [begin] else [begin, *ids]


class TimedStreamer:
    """Another streamer of one row, and when it got what."""

    def __init__(self, streamer: TextStreamer):
        self.streamer = streamer
        self.tokens: list[int] = []
        self.prompt_tokens = 0
        self.interrupted = False
        self.start = self.first = self.last = time.perf_counter()

    def put(self, value: torch.Tensor):
        self.last = time.perf_counter()
        if not self.prompt_tokens:
            self.prompt_tokens = value.numel()
        else:
            self.first = self.first if self.tokens else self.last
            self.tokens += value.tolist()
        self.streamer.put(value)

    def end(self):
        self.streamer.end()

    def facts(self, model) -> dict:
        """What --json prints: counts, seconds and bytes."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens": len(self.tokens),
            "prompt_seconds": self.first - self.start,
            "seconds": self.last - self.first,
            "interrupted": self.interrupted,
            "weight_bytes": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }


def summary(facts: dict) -> str:
    def speed(tokens, seconds):
        return f"{tokens / seconds:.1f} tokens/s" if tokens > 0 and seconds > 0 else "-"

    read = f"{facts['prompt_tokens']} tokens read, {speed(facts['prompt_tokens'], facts['prompt_seconds'])}"
    wrote = f"{facts['tokens']} written, {speed(facts['tokens'] - 1, facts['seconds'])}"
    memory = (
        f"weights {facts['weight_bytes'] / 1e6:.1f} MB, at most {facts['peak_bytes'] / 1e6:.0f} MB in all"
    )
    return f"{read}; {wrote}; {memory}"


def translate(
    texts: Annotated[
        list[str] | None, typer.Argument(help="What to translate; lines of standard input if nothing.")
    ] = None,
    model: ModelOption = None,
    beams: Annotated[int, typer.Option(min=1, help="Of the search; 1 is greedy.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a translation, at most.")] = 256,
    quantization: QuantizationOption = None,
    device: DeviceOption = "cpu",
):
    """Prints the translation of each text, in their order, one a line."""
    lines = texts or read_lines("-")
    options = dict(device=device, quantization=quantization)
    translator = wf.Translator(model or default_model("translator"), **options)
    chunk = 64 * batch_size  # long enough for sorting by length to pay, short enough to print as it goes
    quiet = None if len(lines) > 1 else True
    with interruptible(), tqdm(total=len(lines), desc="Translating", unit="text", disable=quiet) as bar:
        for start in range(0, len(lines), chunk):
            options = dict(num_beams=beams, batch_size=batch_size, max_new_tokens=max_new_tokens)
            for line in translator.translate(lines[start : start + chunk], progress=bar.update, **options):
                print(" ".join(line.splitlines()), flush=True)
