from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from warpformer.nn._attention_inputs import check_causal_hint, check_mask, is_causal_mask
from warpformer.nn._blocks import feed_forward, norm_alone_of_sum, norm_of_sum
from warpformer.nn._drop_in import drop_in, drop_in_, is_plain
from warpformer.nn.rotary_embedding import RotaryEmbedding
from warpformer.ops._arguments import check_flags, require_tensor


@drop_in
class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer on `warpformer.ops`.

        x = norm1(x + dropout1(attention(x)))                x = x + dropout1(attention(norm1(x)))
        x = norm2(x + dropout2(feed_forward(x)))             x = x + dropout2(feed_forward(norm2(x)))
                                                             with norm_first
        feed_forward(x) = linear2(dropout(activation(linear1(x))))

    Constructor, parameters, initialization, state_dict and forward are torch's. Additions are fused with the
    norms, activations with linear1 where there is no gradient, whatever the mode, masks, heads, order of
    dimensions, biases or hooks; a submodule with hooks is called alone, so that they see what torch's see.

    Args:
        rotary: rotates queries and keys of the attention of tokens to each other.

    Args of forward:
        src: [B, T, C] with batch_first, [T, B, C] without, [T, C] unbatched.
        src_mask, src_key_padding_mask, is_causal: attn_mask, key_padding_mask and is_causal of
            MultiheadAttention.

    Returns:
        The shape of `src`. Every row is finite, of a sequence that is all padding, too.

    Raises:
        ArgumentError: as MultiheadAttention.

    Source: torch.nn.TransformerEncoderLayer; "Attention Is All You Need", 3.1; Xiong et al., "On Layer
    Normalization in the Transformer Architecture" (norm_first).
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        rotary: RotaryEmbedding | None = None,
    ):
        super().__init__(
            *(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first),
            *(norm_first, bias, device, dtype),
        )
        drop_in_(self)
        if rotary is not None:
            self.self_attn.rotary = rotary

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        return self._layer(src, lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal))

    def forward_packed(self, src: Tensor, cu_seqlens: Tensor, is_causal: bool = False) -> Tensor:
        """forward of sequences without padding.

        Args:
            src: [N, C], the sequences one after the other.
            cu_seqlens: [sequences + 1] int32, where each begins, and N.
        """
        return self._layer(
            src, lambda x: self.dropout1(self.self_attn.forward_packed(x, cu_seqlens, is_causal))
        )

    def _layer(self, x, attention):
        if self.norm_first:
            h, x = norm_of_sum(self.norm2, x, attention(self.norm1(x)))
            return x + self._ff_block(h)
        x = norm_alone_of_sum(self.norm1, x, attention(x))
        return norm_alone_of_sum(self.norm2, x, self._ff_block(x))

    def _ff_block(self, x):
        return self.dropout2(feed_forward(self.linear1, self.activation, self.dropout, self.linear2, x))


@drop_in
class TransformerEncoder(nn.TransformerEncoder):
    """torch.nn.TransformerEncoder: a stack of copies of a layer, and a norm.

    Constructor, state_dict and forward are torch's. Padding is not computed where torch's encoder would take
    nested tensors (use_nested_tensor: batch_first and not norm_first, in eval mode without gradient), with a
    causal mask, too; as in torch the layers give 0 there.

    Args of forward:
        src: [B, T, C] with batch_first, [T, B, C] without, [T, C] unbatched.
        mask, src_key_padding_mask: attn_mask and key_padding_mask of MultiheadAttention.
        is_causal: whether `mask` is the causal one; found out if None.

    Raises:
        ArgumentError: as MultiheadAttention.

    Source: torch.nn.TransformerEncoder.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        require_tensor("src", src)
        if src_key_padding_mask is not None:
            require_tensor("src_key_padding_mask", src_key_padding_mask)
        if is_causal is None:
            is_causal = found_causal(mask)
        check_flags("TransformerEncoder", is_causal=is_causal)
        if is_causal:
            check_causal_hint(mask)
        if self._packs(src, mask, src_key_padding_mask, is_causal):
            x = self._forward_packed(src, src_key_padding_mask, is_causal)
        else:
            x = src
            for layer in self.layers:
                x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal)
        return x if self.norm is None else self.norm(x)

    def _packs(self, src, mask, padding, is_causal):
        return (
            self.use_nested_tensor
            and padding is not None
            and padding.dtype == torch.bool
            and (mask is None or is_causal)
            and src.ndim == 3
            and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
            and all(type(layer) is TransformerEncoderLayer for layer in self.layers)
            and all(is_plain(module) for layer in self.layers for module in layer.modules())
            and all(layer.self_attn.packs for layer in self.layers)
        )

    def _forward_packed(self, src, padding, is_causal):
        check_mask("src_key_padding_mask", padding, tuple(src.shape[:2]))
        kept = padding.logical_not()
        cu_seqlens = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        x = src[kept]
        for layer in self.layers:
            x = layer.forward_packed(x, cu_seqlens, is_causal)
        out = src.new_zeros(src.shape, dtype=x.dtype)
        out[kept] = x
        return out


def found_causal(mask: Tensor | None) -> bool:
    return mask is not None and not torch.compiler.is_compiling() and is_causal_mask(mask)
