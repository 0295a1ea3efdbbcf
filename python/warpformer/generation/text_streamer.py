import sys
from collections.abc import Callable

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from warpformer._C import InputError


def print_now(text: str):
    print(text, end="", flush=True, file=sys.stdout)


class TextStreamer:
    """The `streamer` of `generate` that writes the text of one row as it comes, in whole characters, without
    special tokens and without the prompt.

    Args:
        tokenizer: of the tokenizers library.
        write: gets each piece of text; prints it if it is not given.

    Raises:
        InputError: there are several rows.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object] = print_now):
        self.tokenizer = tokenizer
        self.write = write
        self._stream: DecodeStream | None = None

    def put(self, value: Tensor):
        if len(value) != 1:
            raise InputError(f"a TextStreamer writes one row, not {len(value)}")
        tokens = value.flatten().tolist()
        if self._stream is None:  # the prompt: what the first piece of text joins
            self._stream = DecodeStream(ids=tokens, skip_special_tokens=True)
            return
        for token in tokens:
            text = self._stream.step(self.tokenizer, token)
            if text:
                self.write(text)

    def end(self):
        self._stream = None
