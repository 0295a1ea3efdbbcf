"""Conversations as the tokens that a model was trained on."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from warpformer._C import InputError
from warpformer.checkpoint import open_tokenizer, read_json
from warpformer.models._config import CheckpointError

MOST = 1 << 20  # characters of a template
LONGEST = 1 << 24  # and of what it makes
MARK = "\ue000{}\ue001"  # in the place of a content; of the private use area
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
Message = Mapping[str, str]


class ChatTemplate:
    """What makes a prompt of messages: a template in jinja, as checkpoints of chat models have it.

    It runs in a sandbox. What people write is never taken for a special token: "<|im_end|>" in a content is
    these letters.

    Args:
        template: its source.
        tokenizer: of the tokenizers library.
        variables: what the template may name besides: bos_token, eos_token...

    Raises:
        CheckpointError: the template is none, or too long.

    Source: "Chat templates" in the documentation of transformers.
    """

    def __init__(self, template: str, tokenizer: Tokenizer, variables: Mapping[str, object] | None = None):
        if len(template) > MOST:
            raise CheckpointError(f"the chat template has {len(template)} characters, more than {MOST}")
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
        )
        environment.filters["tojson"] = to_json
        environment.globals |= dict(raise_exception=refuse, strftime_now=strftime_now)
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from None

    @classmethod
    def of_checkpoint(cls, folder) -> "ChatTemplate":
        """That of chat_template.jinja or tokenizer_config.json in a folder.

        Raises:
            CheckpointError: there is none.
        """
        folder = Path(folder)
        path = folder / "tokenizer_config.json"
        settings = read_json(path) if path.is_file() else {}
        template = settings.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if isinstance(template, list):  # of several, by name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if not isinstance(template, str):
            raise CheckpointError(f"{folder} has no chat template: its model was not made to chat")
        tokens = {name: text_of(settings.get(name)) for name in TOKENS}
        return cls(template, open_tokenizer(folder), {k: v for k, v in tokens.items() if v is not None})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of messages.

        Args:
            messages: each with a role, "system", "user" or "assistant", and a content.
            add_generation_prompt: with what the model's answer stands behind.

        Raises:
            InputError: there is no message, or one has no role or content; the template refuses them, or
                makes too much.
        """
        if not messages:
            raise InputError("chat: there is no message")
        for message in messages:
            if not all(isinstance(message.get(name), str) for name in ("role", "content")):
                raise InputError(f"chat: {dict(message)!r:.80} is no message: role and content are texts")
        pieces, length = [], 0
        given = dict(messages=list(messages), add_generation_prompt=add_generation_prompt)
        try:
            for piece in self._template.generate(self.variables | given):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST:
                    raise InputError(f"chat: the template makes more than {LONGEST} characters")
        except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise InputError(f"chat: the template refuses the messages: {error}") from error
        return "".join(pieces)

    def encode(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The tokens of messages; arguments and errors are those of `render`.

        Raises:
            InputError: also, where the template changes more of a content than the white space at its ends,
                so that it cannot be told from the template's own text.
        """
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        contents = self._contents(text, messages, add_generation_prompt)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        found = [
            (token, *span)
            for token, span in zip(encoding.ids, encoding.offsets, strict=True)
            if token in self._special
        ]
        own = [one for one in found if not any(one[1] < end and start < one[2] for start, end in contents)]
        if len(own) == len(found):
            return encoding.ids
        ids, before = [], 0
        for token, start, end in own:
            ids += [*self._plain.encode(text[before:start], add_special_tokens=False).ids, token]
            before = end
        return ids + self._plain.encode(text[before:], add_special_tokens=False).ids

    def _contents(self, text, messages, add_generation_prompt) -> list[tuple[int, int]]:
        """Where the contents lie in the text."""
        marks = [MARK.format(i) for i in range(len(messages))]
        marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
        pattern = self.render(marked, add_generation_prompt=add_generation_prompt)
        for change in (str, str.strip, str.rstrip, str.lstrip):
            spans, made, rest = [], "", pattern
            while (at := rest.find(MARK[0])) >= 0:
                mark = rest[at : rest.index(MARK[-1], at) + 1]
                if mark not in marks:
                    break  # of the template's own
                content = change(messages[marks.index(mark)]["content"])
                made += rest[:at]
                spans.append((len(made), len(made) + len(content)))
                made, rest = made + content, rest[at + len(mark) :]
            if made + rest == text:
                return spans
        raise InputError("chat: the template changes what messages say, and its own text cannot be told")

    @cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def _plain(self) -> Tokenizer:
        """One to which special tokens are letters."""
        plain = Tokenizer.from_str(self.tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, which marks what a model has said, and changes nothing."""

    tags = {"generation"}  # noqa: RUF012, as jinja has it

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    options = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return json.dumps(value, **options)


def refuse(message):
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def text_of(token) -> str | None:
    """Of a token in tokenizer_config.json, which is a text or has one."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
