"""`warpformer demo`."""

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import warpformer as wf
from warpformer import demo as timing
from warpformer.checkpoint import default_model
from warpformer.cli._encoder import EncoderOption, load_encoder
from warpformer.cli._generate import generate
from warpformer.cli._text import read_lines

SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
ENGLISH = [
    "In the beginning God created the heaven and the earth.",
    "The woman gave him bread and water.",
    "Do not be afraid; the king is coming to the city tomorrow.",
]
PROMPT = "And it came to pass"

console = Console(highlight=False)


def demo(
    text: Annotated[
        str | None, typer.Argument(help="Sentences to time the model on, one a line; else random words.")
    ] = None,
    model: EncoderOption = None,
):
    """Embeds, translates and writes with the models that come with the package; then times them and some
    ops beside torch."""
    encoder = load_encoder(model)
    sentences = read_lines(text) if text else timing.random_sentences(encoder.tokenizer, 256)

    heading("Similarity of sentences")
    embeddings = encoder.encode(SENTENCES)
    for sentence, row in zip(SENTENCES, encoder.similarity(embeddings, embeddings), strict=True):
        console.print("  ".join(f"{value:.4f}" for value in row.tolist()), f" {sentence}")

    heading("Translation")
    spanish = wf.Translator(default_model("translator")).translate(ENGLISH)
    for source, translation in zip(ENGLISH, spanish, strict=True):
        console.print(f"{source}\n    {translation}")

    heading("A language model goes on")
    generate(PROMPT, max_new_tokens=80, seed=0)

    heading(f"Beside torch, {torch.get_num_threads()} threads, {wf.info()['isa']}")
    console.print(race(encoder, sentences))


def heading(text: str):
    console.print(f"\n[bold]{text}[/bold]")


def race(encoder: wf.SentenceEncoder, sentences: list[str]) -> Table:
    table = Table()
    for column in ("", "warpformer, ms", "torch, ms", "times as fast"):
        table.add_column(column, justify="right" if column else "left")
    for name, *functions in tqdm(timing.pairs(encoder, sentences), desc="Timing", leave=False):
        ours, theirs = timing.milliseconds(functions)
        table.add_row(name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    return table
