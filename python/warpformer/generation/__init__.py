from warpformer.generation.config import GenerationConfig
from warpformer.generation.generate import Generated, Generating, generate
from warpformer.generation.text_streamer import TextStreamer

__all__ = ["Generated", "Generating", "GenerationConfig", "TextStreamer", "generate"]
