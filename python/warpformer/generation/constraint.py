"""Texts that follow a grammar, by the library llguidance."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from warpformer.generation.checks import require
from warpformer.generation.history import History

MOST = 1 << 20  # characters of a grammar
STATES = 4096  # that are kept for rows to go on from


class Constraint:
    """What `generate` and `Engine.submit` take as `constraint`: new tokens make a text of a grammar.

        constraint = wf.Constraint.json_schema({"type": "object", ...}, tokenizer)
        model.generate(ids, constraint=constraint, max_new_tokens=200)

    Of every row, prompts apart. A token is possible if some text of the grammar begins with the row's new
    tokens and it; eos_token_id, where the text is whole. Where max_new_tokens ends a row before, its text is
    not whole.

    Args:
        grammar: of llguidance.
        tokenizer: of the tokenizers library.

    Raises:
        InputError: the grammar is none, or too long.
        ModuleNotFoundError: llguidance is missing, the extra `constraints`.

    Source: Willard and Louf, "Efficient Guided Generation for Large Language Models" (2023).
    """

    def __init__(self, grammar: str, tokenizer: Tokenizer):
        require(len(grammar) <= MOST, f"a grammar of {len(grammar)} characters is longer than {MOST}")
        self.grammar = grammar
        self._tokenizer = tokenizer.to_str()
        self._vocabularies: dict[tuple[int, ...], object] = {}
        error = library().LLMatcher.validate_grammar(grammar, self._vocabulary(()))
        require(not error or error.startswith("WARNING"), f"the grammar cannot be read: {error}")

    @classmethod
    def json_schema(cls, schema: str | dict, tokenizer: Tokenizer) -> Constraint:
        """JSON that has this schema, {} for any, laid out as `json.dumps` does."""
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(schema)
        except (ValueError, TypeError, RecursionError) as error:
            require(False, f"the schema is not JSON: {error}")
        # Where any white space may stand, models write it without end.
        layout = dict(whitespace_flexible=False, item_separator=", ", key_separator=": ")
        return cls(library().LLMatcher.grammar_from_json_schema(text, overrides=layout), tokenizer)

    @classmethod
    def regex(cls, pattern: str, tokenizer: Tokenizer) -> Constraint:
        """A text that a regular expression of Rust's regex matches as a whole."""
        return cls(library().LLMatcher.grammar_from_regex(pattern), tokenizer)

    @classmethod
    def lark(cls, grammar: str, tokenizer: Tokenizer) -> Constraint:
        """A text of a context-free grammar in Lark's notation, as llguidance has it."""
        return cls(library().LLMatcher.grammar_from_lark(grammar), tokenizer)

    def processor(self, eos: Sequence[int]) -> Allowed:
        """For rows that one of these tokens ends."""
        require(eos, "a constraint needs an eos_token_id, which ends what is whole")
        return Allowed(self.grammar, self._vocabulary(tuple(eos)), eos)

    def _vocabulary(self, eos):
        if eos not in self._vocabularies:
            options = {"eos_token": [*eos]} if eos else {}
            self._vocabularies[eos] = library().LLTokenizer(self._tokenizer, **options)
        return self._vocabularies[eos]


class Allowed:
    """The processor of a call: scores of tokens that do not follow the grammar become -inf.

    States of the matcher are kept by the tokens that led to them, so that rows may go on in any order, as
    beams do.
    """

    def __init__(self, grammar: str, vocabulary, eos: Sequence[int]):
        self.eos = [*eos]
        self._states: OrderedDict[tuple[int, ...], object] = OrderedDict()
        self._start = library().LLMatcher(vocabulary, grammar, log_level=0)

    def __call__(self, history: History, scores: Tensor) -> Tensor:
        width, new = history.tokens.shape[1], history.new.tolist()
        rows = [tuple(row[width - n :]) for row, n in zip(history.tokens.tolist(), new, strict=True)]
        banned = np.stack([~self._allowed(row, scores.shape[1]) for row in rows])
        return scores.masked_fill(torch.from_numpy(banned).to(scores.device), -torch.inf)

    def _allowed(self, tokens: tuple[int, ...], vocabulary: int) -> np.ndarray:
        """[V] bool."""
        state, allowed = self._state(tokens), np.zeros(vocabulary, bool)
        if state.is_error():  # a beam that has no chance, whose score is -inf
            return allowed
        bits = np.frombuffer(state.compute_bitmask(), np.uint8)
        found = np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
        allowed[: len(found)] = found
        allowed[self.eos] = state.is_accepting()
        return allowed

    def _state(self, tokens):
        state = self._states.get(tokens)
        if state is None:
            known = next((n for n in range(len(tokens) - 1, 0, -1) if tokens[:n] in self._states), 0)
            state = (self._states[tokens[:known]] if known else self._start).deep_copy()
            state.consume_tokens([*tokens[known:]])
            self._states[tokens] = state
            if len(self._states) > STATES:
                self._states.popitem(last=False)
        else:
            self._states.move_to_end(tokens)
        return state


def library():
    try:
        import llguidance
    except ModuleNotFoundError:
        message = "a constraint needs llguidance: pip install 'warpformer[constraints]'"
        raise ModuleNotFoundError(message) from None
    return llguidance
