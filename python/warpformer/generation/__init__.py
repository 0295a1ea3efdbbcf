from warpformer.generation.config import GenerationConfig
from warpformer.generation.constraint import Constraint
from warpformer.generation.engine import Engine, Prefix
from warpformer.generation.generate import Generated, Generating, generate
from warpformer.generation.request import Finished, Request
from warpformer.generation.text_streamer import TextStreamer

__all__ = [
    "Constraint",
    "Engine",
    "Finished",
    "Generated",
    "Generating",
    "GenerationConfig",
    "Prefix",
    "Request",
    "TextStreamer",
    "generate",
]
