"""`warpformer generate | translate`."""

import sys
from typing import Annotated

import torch
import typer
from tqdm import tqdm

import warpformer as wf
from warpformer.checkpoint import default_model, find_checkpoint, open_tokenizer, read_json
from warpformer.cli._text import fail, read_lines
from warpformer.generation.defaults import of_model

ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Folder or hub id of a model.", show_default="that of the package"),
]
QuantizationOption = Annotated[
    str | None, typer.Option("--quantization", help="int8, int4...: as it is loaded.", show_default="none")
]


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on with; - is standard input.")],
    model: ModelOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw among so many tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among tokens of this probability.", show_default="1")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", show_default="another each time")] = None,
    quantization: QuantizationOption = None,
):
    """Prints the prompt and, as it comes, what a language model has to say after it."""
    if prompt == "-":
        prompt = "\n".join(read_lines("-"))
    folder = find_checkpoint(model or default_model("language_model"))
    tokenizer = open_tokenizer(folder)
    network = wf.load(folder, quantization=quantization)
    if not hasattr(network, "generate") or hasattr(network, "encode"):
        fail(f"{model} is no language model but a {type(network).__name__}")
    ids = prompt_ids(prompt, tokenizer, network, folder)
    if not ids:
        fail("the prompt is empty, and the model has no token that begins a text")
    sampling = dict(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p) if temperature else {}
    sys.stdout.write(prompt)
    streamer = wf.TextStreamer(tokenizer)
    options = dict(max_new_tokens=max_new_tokens, seed=seed, streamer=streamer)
    network.generate(torch.tensor([ids]), **options, **sampling)
    sys.stdout.write("\n")


def prompt_ids(prompt, tokenizer, model, folder) -> list[int]:
    """The tokens of a prompt, behind the one that begins a text: config.json's bos_token_id, unless
    tokenizer_config.json says that texts begin without."""
    ids, begin = tokenizer.encode(prompt).ids, of_model(model, "bos_token_id")
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    without = settings.get("add_bos_token") is False or settings.get("bos_token", "") is None
    return ids if begin is None or without or ids[:1] == [begin] else [begin, *ids]


def translate(
    texts: Annotated[
        list[str] | None, typer.Argument(help="What to translate; lines of standard input if nothing.")
    ] = None,
    model: ModelOption = None,
    beams: Annotated[int, typer.Option(min=1, help="Of the search; 1 is greedy.")] = 4,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 32,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a translation, at most.")] = 256,
    quantization: QuantizationOption = None,
):
    """Prints the translation of each text, in their order, one a line."""
    lines = texts or read_lines("-")
    translator = wf.Translator(model or default_model("translator"), quantization=quantization)
    chunk = 64 * batch_size  # long enough for sorting by length to pay, short enough to print as it goes
    with tqdm(
        total=len(lines), desc="Translating", unit="text", disable=None if len(lines) > 1 else True
    ) as bar:
        for start in range(0, len(lines), chunk):
            options = dict(num_beams=beams, batch_size=batch_size, max_new_tokens=max_new_tokens)
            for line in translator.translate(lines[start : start + chunk], progress=bar.update, **options):
                print(" ".join(line.splitlines()), flush=True)
