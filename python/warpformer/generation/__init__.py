from warpformer.generation.config import GenerationConfig
from warpformer.generation.generate import Generating, generate
from warpformer.generation.text_streamer import TextStreamer

__all__ = ["Generating", "GenerationConfig", "TextStreamer", "generate"]
