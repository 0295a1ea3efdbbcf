"""Where words and sentences are, by the tokens alone."""

import numpy as np
from tokenizers import Tokenizer

LETTERS, DIGITS, OTHERS = range(3)
ENDS = ".!?\u2026\n"  # of sentences
CLOSING = "\"')]}\u00bb\u2019\u201d"  # what may follow


class Words:
    """What is known of each token of a vocabulary of bytes.

    Attributes:
        spaced: [V] bool, whether it begins with white space.
        spaces: [V] bool, whether it is nothing but spaces, which belong to the word after them.
        kinds: [V], whether its last character is a letter, a digit or neither; bytes of no whole character
            count as letters.
        ends: [V] bool, whether a sentence may end with it: it has a full stop or its like, or a line break.
        trails: [V] bool, whether it is nothing but such marks and closing quotes.
    """

    def __init__(self, tokenizer: Tokenizer):
        texts = token_texts(tokenizer)
        self.spaced = np.array([text[:1].isspace() for text in texts])
        self.spaces = np.array([bool(text) and not text.strip(" ") for text in texts])
        self.kinds = np.array([kind(text) for text in texts])
        self.ends = np.array([text.rstrip(CLOSING)[-1:] in [*ENDS] for text in texts])
        self.trails = np.array([bool(text) and not text.strip(CLOSING + ENDS) for text in texts])

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """[N] bool, where in tokens [N] words begin."""
        starts = self.spaced[tokens] | (np.diff(self.kinds[tokens], prepend=-1) != 0)
        starts[1:] &= ~self.spaces[tokens[:-1]]
        return starts

    def sentences(self, tokens: np.ndarray) -> list[np.ndarray]:
        """Tokens [N] in pieces, each up to the end of a sentence."""
        ends, trails = self.ends[tokens], self.trails[tokens]
        places = np.arange(len(tokens))
        before = np.maximum.accumulate(np.where(ends | ~trails, places, 0))  # what closing quotes belong to
        is_last = ends[before[:-1]] & ~trails[1:]
        return np.split(tokens, np.flatnonzero(is_last) + 1)


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each token; of a part of a character a replacement character."""
    decoder = tokenizer.decoder
    tokens = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    return [decoder.decode([token]) if decoder is not None else token for token in tokens]


def kind(text: str) -> int:
    last = text[-1:]
    if last.isalpha() or last == "\ufffd":
        return LETTERS
    return DIGITS if last.isdigit() else OTHERS
