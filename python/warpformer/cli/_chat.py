"""`warpformer chat`."""

import sys
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

import warpformer as wf
from warpformer.chat import ChatTemplate
from warpformer.checkpoint import find_checkpoint
from warpformer.cli._generate import QuantizationOption
from warpformer.cli._text import DeviceOption, fail
from warpformer.generation.checks import as_tuple
from warpformer.generation.defaults import of_model
from warpformer.generation.prompts import longest_of
from warpformer.generation.text_streamer import print_now


def chat(
    model: Annotated[str, typer.Option("--model", help="Folder or hub id of a model with a chat template.")],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 takes the likeliest token.", show_default="the model's")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws.", show_default="another each time")] = None,
    quantization: QuantizationOption = None,
    device: DeviceOption = "cpu",
):
    """Answers line after line. Ctrl-C ends an answer, Ctrl-D the conversation."""
    folder = find_checkpoint(model)
    template = ChatTemplate.of_checkpoint(folder)
    network = wf.load(folder, device=device, quantization=quantization)
    if not hasattr(network, "generate") or hasattr(network, "encode"):
        fail(f"{model} is no language model but a {type(network).__name__}")
    options = dict(max_new_tokens=max_new_tokens, num_beams=1, seed=seed)
    if temperature is not None:
        options |= dict(do_sample=True, temperature=temperature) if temperature else dict(do_sample=False)
    conversation = Conversation(network, template, system, options)
    while (line := read_line()) is not None:
        if line.strip():
            conversation.answer(line)


def read_line() -> str | None:
    """None at the end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        return ""
    return line.rstrip("\n") if line else None


class Conversation:
    """Messages, and the cache of what the model has read of them.

    Where they have become longer than the model reads, with room for a quarter of that, the oldest behind the
    system's message are left out.
    """

    def __init__(self, model, template: ChatTemplate, system: str | None, options: dict):
        self.model, self.template, self.options = model, template, options
        self.device = next(model.parameters()).device
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.first = len(self.messages)
        self.cache, self.held = model.make_cache(), []
        ends = as_tuple(of_model(model, "eos_token_id"))
        token = template.tokenizer.token_to_id(template.variables.get("eos_token", ""))
        self.ends = [*ends, *({token} - {None, *ends})]

    def answer(self, text: str):
        """Prints what the model has to say."""
        self.messages.append({"role": "user", "content": text})
        ids = self._fitting()
        self._rewind(ids)
        written = Written(self.template.tokenizer)
        try:
            options = dict(cache=self.cache, streamer=written, eos_token_id=self.ends or None)
            found = self.model.generate(torch.tensor([ids], device=self.device), **options, **self.options)
            self.held = found[0, :-1].tolist()
        except KeyboardInterrupt:
            pass  # the cache is as before
        print_now("\n")
        self.messages.append({"role": "assistant", "content": written.text})

    def _fitting(self) -> list[int]:
        longest = longest_of(self.model)
        while True:
            ids = self.template.encode(self.messages)
            if longest is None or len(ids) <= longest - longest // 4 or len(self.messages) <= self.first + 2:
                return ids
            print("(the beginning of the conversation is left out)", file=sys.stderr)
            del self.messages[self.first : self.first + 2]

    def _rewind(self, ids):
        """The cache holds what it has of these tokens, and not the last."""
        same = 0
        while same < min(len(self.held), len(ids) - 1) and self.held[same] == ids[same]:
            same += 1
        if len(self.cache):
            try:
                self.cache.rewind_(len(self.held) - same)
                self.held = self.held[:same]
                return
            except wf.InputError:  # of windows, what they have passed
                pass
        self.cache, self.held = self.model.make_cache(), []


class Written(wf.TextStreamer):
    """Prints, and has it all as `text`."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, self._print)
        self.text = ""

    def _print(self, piece: str):
        self.text += piece
        print_now(piece)
