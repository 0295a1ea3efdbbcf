"""`warpformer perplexity`."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

import warpformer as wf
from warpformer.checkpoint import default_model, find_checkpoint, open_tokenizer
from warpformer.cli._generate import ModelOption, QuantizationOption
from warpformer.cli._text import DeviceOption, fail, interruptible
from warpformer.scoring import Perplexity
from warpformer.scoring import perplexity as perplexity_of
from warpformer.training.text import parse_texts


def perplexity(
    file: Annotated[
        str, typer.Argument(help="UTF-8 text; a blank line ends a document; - is standard input.")
    ],
    model: ModelOption = None,
    quantization: QuantizationOption = None,
    device: DeviceOption = "cpu",
    column: Annotated[
        int | None,
        typer.Option(min=0, help="Of a tab-separated file, from 0 on.", show_default="whole lines"),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens that the model reads at once.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="By which it moves on.", show_default="half of it")
    ] = None,
    int8_cache: Annotated[
        bool, typer.Option("--int8-cache", help="Attend to keys and values in int8.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
):
    """Prints how well a language model predicts a text: exp of the mean loss of a token, and bits a byte."""
    folder = find_checkpoint(model or default_model("language_model"))
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    texts = parse_texts(data, file, None if column is None else [column])
    if texts.skipped:
        print(texts.report(), file=sys.stderr)
    tokenizer = open_tokenizer(folder)
    network = wf.load(folder, device=device, quantization=quantization)
    if not hasattr(network, "generate") or hasattr(network, "encode"):
        fail(f"{model} is no language model but a {type(network).__name__}")
    start = time.perf_counter()
    with interruptible(), tqdm(desc="Reading", unit="token", unit_scale=True) as bar:
        options = dict(window=window, stride=stride, int8_cache=int8_cache, progress=bar.update)
        found = perplexity_of(network, tokenizer, texts, **options)
    report(found, time.perf_counter() - start, as_json)


def report(found: Perplexity, seconds: float, as_json: bool):
    values = {
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
        "seconds": seconds,
    }
    if as_json:
        print(json.dumps(values))
        return
    speed = f"{found.tokens / seconds:.0f} tokens/s"
    sizes = f"{found.tokens} tokens, {found.bytes} bytes, {speed}"
    print(f"perplexity {found.perplexity:.3f} of a token, {found.bits_per_byte:.4f} bits a byte; {sizes}")
