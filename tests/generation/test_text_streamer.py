import pytest
import torch

import warpformer as wf

from .text import make_tokenizer


def test_characters_are_never_split():
    tokenizer = make_tokenizer()
    text = " ž €\N{GRINNING FACE} fin"
    ids, pieces = tokenizer.encode(text).ids, []
    streamer = wf.TextStreamer(tokenizer, pieces.append)
    streamer.put(torch.tensor([tokenizer.encode("the prompt").ids]))
    for token in [*ids, 2]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == text
    assert len(pieces) > 4
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    with pytest.raises(wf.InputError, match="one row, not 2"):
        streamer.put(torch.tensor([[1], [2]]))
