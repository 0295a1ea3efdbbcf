"""Layers of Transformers: how attention and feed-forward blocks, norms and residual additions follow."""

from torch import Tensor, nn

from warpformer.nn.cross_attention import Memory
from warpformer.nn.layer_cache import DecoderLayerCache, LayerCache
from warpformer.nn.sequences import Sequences


class PreNormLayer(nn.Module):
    """
        x = x + attention(attention_norm(x))
        x = x + feed_forward(feed_forward_norm(x))

    on rows [N, C] of packed sequences. Source: Xiong et al., "On Layer Normalization in the Transformer
    Architecture".
    """

    def __init__(
        self, attention_norm: nn.Module, attention: nn.Module, feed_forward_norm: nn.Module, feed_forward
    ):
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.feed_forward_norm = feed_forward_norm
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        x = self.attention(self.attention_norm(x), sequences, cache, residual=x)
        return self.feed_forward(self.feed_forward_norm(x), residual=x)


class PostNormLayer(PreNormLayer):
    """
        x = attention_norm(x + attention(x))
        x = feed_forward_norm(x + feed_forward(x))

    on rows [N, C] of packed sequences. Source: "Attention Is All You Need", 3.1.
    """

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        x = self.attention_norm(self.attention(x, sequences, cache, residual=x))
        return self.feed_forward_norm(self.feed_forward(x, residual=x))


class SandwichNormLayer(PreNormLayer):
    """
        x = x + attention_post_norm(attention(attention_norm(x)))
        x = x + feed_forward_post_norm(feed_forward(feed_forward_norm(x)))

    on rows [N, C] of packed sequences. Source: Gemma Team, "Gemma 2"; xai-org, grok-1.
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        attention_post_norm: nn.Module,
        feed_forward_norm: nn.Module,
        feed_forward: nn.Module,
        feed_forward_post_norm: nn.Module,
    ):
        super().__init__(attention_norm, attention, feed_forward_norm, feed_forward)
        self.attention_post_norm = attention_post_norm
        self.feed_forward_post_norm = feed_forward_post_norm

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), sequences, cache))
        return x + self.feed_forward_post_norm(self.feed_forward(self.feed_forward_norm(x)))


class PreNormCrossLayer(PreNormLayer):
    """
        x = x + attention(attention_norm(x))
        x = x + cross_attention(cross_attention_norm(x), memory)
        x = x + feed_forward(feed_forward_norm(x))

    on rows [N, C] of packed sequences, each of which has a memory. Source: "Attention Is All You Need", 3.1;
    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer".
    """

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: nn.Module,
        cross_attention_norm: nn.Module,
        cross_attention: nn.Module,
        feed_forward_norm: nn.Module,
        feed_forward: nn.Module,
    ):
        super().__init__(attention_norm, attention, feed_forward_norm, feed_forward)
        self.cross_attention_norm = cross_attention_norm
        self.cross_attention = cross_attention

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Memory | None,
        cache: DecoderLayerCache | None = None,
    ) -> Tensor:
        """memory: None where `cache` holds it."""
        own, cross = cache or (None, None)
        x = self.attention(self.attention_norm(x), sequences, own, residual=x)
        x = self.cross_attention(self.cross_attention_norm(x), sequences, memory, cross, residual=x)
        return self.feed_forward(self.feed_forward_norm(x), residual=x)

    def make_cache(self) -> DecoderLayerCache:
        return DecoderLayerCache(self.attention.make_cache(), self.cross_attention.make_cache())


class PostNormCrossLayer(PreNormCrossLayer):
    """
        x = attention_norm(x + attention(x))
        x = cross_attention_norm(x + cross_attention(x, memory))
        x = feed_forward_norm(x + feed_forward(x))

    on rows [N, C] of packed sequences, each of which has a memory. Source: "Attention Is All You Need", 3.1.
    """

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        memory: Memory | None,
        cache: DecoderLayerCache | None = None,
    ) -> Tensor:
        own, cross = cache or (None, None)
        x = self.attention_norm(self.attention(x, sequences, own, residual=x))
        x = self.cross_attention_norm(self.cross_attention(x, sequences, memory, cross, residual=x))
        return self.feed_forward_norm(self.feed_forward(x, residual=x))
