import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._packed import PackedModule
from warpformer.nn.dropout import Dropout
from warpformer.nn.feed_forward import added
from warpformer.nn.layer_cache import LayerCache
from warpformer.nn.rotary_embedding import RotaryEmbedding
from warpformer.nn.sequences import Sequences
from warpformer.ops.linear import is_plain


class LatentAttention(nn.Module):
    """Multi-head latent attention (MLA): keys and values of all heads are made of one latent vector a token,
    which alone is cached.

        q_h = [qn_h, rope(qr_h)],                  [qn_h, qr_h] = q(x)
        k_h = [Uk_h c, rope(kr)], v_h = Uv_h c,    [latent, kr] = kv_down(x), c = kv_norm(latent)
        forward(x, ...) = out(concat_h(attention(q_h, k_h, v_h))) + residual

    where kv_up holds Uk_h and, below it, Uv_h of one head after the other. With a cache that holds c and
    rope(kr) of earlier tokens, side by side, Uk is absorbed by the query and Uv by the output:

        q_h k_h = (Uk_h^T qn_h) c + rope(qr_h) rope(kr)

    and every head attends to the same R + Dr numbers a token.

    Args:
        q: a module [C] to [H (Dn + Dr)].
        kv_down: Linear, [C] to [R + Dr].
        kv_norm: of R.
        kv_up: Linear without bias, [R] to [H (Dn + Dv)].
        out: Linear, [H Dv] to [C].
        num_heads: H.
        rope_dim: Dr.
        value_dim: Dv.
        rotary: of Dr.
        scale: of the scores.
        attention_dropout: probability of a 0 in the weights, in training.

    Args of forward:
        x: [N, C], rows of `sequences`.
        sequences: whose tokens they are.
        cache: a LayerCache, to which latents are appended.
        residual: [N, C].

    Returns:
        [N, C].

    Source: DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model"
    (2024), 2.1.
    """

    def __init__(
        self,
        q: nn.Module,
        kv_down: nn.Module,
        kv_norm: nn.Module,
        kv_up: nn.Module,
        out: nn.Module,
        num_heads: int,
        rope_dim: int,
        value_dim: int,
        *,
        rotary: RotaryEmbedding,
        scale: float,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.q = q
        self.kv_down = kv_down
        self.kv_norm = kv_norm
        self.kv_up = kv_up
        self.out = out
        self.num_heads = num_heads
        self.rope_dim = rope_dim
        self.value_dim = value_dim
        self.rotary = rotary
        self.scale = scale
        self.dropout = Dropout(0.0)
        self.attention_dropout = attention_dropout
        self._absorbed = (None, None, None)  # the weight they are of, Uk^T and Uv

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        cache: LayerCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        q = self.q(x).unflatten(-1, (self.num_heads, -1))  # [N, H, Dn + Dr]
        latent, k_rope = self.kv_down(x).tensor_split([-self.rope_dim], -1)
        latent = self.kv_norm(latent)
        q_rope, k_rope = self.rotary(q[..., -self.rope_dim :], k_rope[:, None], sequences.positions)
        q_plain = q[..., : -self.rope_dim]
        if cache is not None:
            self._absorbed_weights()  # made before a step is recorded, which would make them again
            cache.append(torch.cat([latent[:, None], k_rope], -1), None, sequences)
        if cache is not None and not sequences.is_first:
            out = self._attend_to_latents(q_plain, q_rope, cache, sequences)
        else:
            out = self._attend(q_plain, q_rope, latent, k_rope, sequences)
        return added(self.out, self.dropout, out.flatten(1), residual)

    def _attend(self, q_plain, q_rope, latent, k_rope, sequences):
        """[N, H, Dv], by keys and values of every head."""
        keys_and_values = self.kv_up(latent).unflatten(-1, (self.num_heads, -1))
        k_plain, v = keys_and_values.tensor_split([-self.value_dim], -1)
        q = torch.cat([q_plain, q_rope], -1)
        k = torch.cat([k_plain, k_rope.expand(-1, self.num_heads, -1)], -1)
        starts, dropout = sequences.cu_seqlens, self.attention_dropout if self.training else 0.0
        options = dict(dropout_p=dropout, cu_seqlens_q=starts, cu_seqlens_k=starts)
        return ops.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, **options)

    def _attend_to_latents(self, q_plain, q_rope, cache, sequences):
        up_keys, up_values = self._absorbed_weights()
        q = torch.cat([self._by_head(q_plain, up_keys), q_rope], -1)  # [N, H, R + Dr]
        return self._by_head(cache.attend(q, sequences, scale=self.scale), up_values)

    def _by_head(self, x, weight):
        """[N, H, outputs] of x [N, H, inputs] by the weight [H, outputs, inputs]."""
        heads, rows = self.num_heads, len(x)
        if is_plain(weight.data):  # on a GPU: of all heads as many rows, a batched product
            dtype = torch.promote_types(x.dtype, weight.data.dtype)
            return (x.transpose(0, 1).to(dtype) @ weight.data.mT.to(dtype)).transpose(0, 1).to(x.dtype)
        offsets = torch.arange(1, heads + 1) * rows
        out = ops.grouped_linear(x.transpose(0, 1).flatten(0, 1), weight, offsets)
        return out.unflatten(0, (heads, rows)).transpose(0, 1)

    def _absorbed_weights(self):
        """Uk^T [H, R, Dn] and Uv [H, Dv, R], packed: made of kv_up when it is first decoded with."""
        held = self.kv_up.packed if isinstance(self.kv_up, PackedModule) else self.kv_up.weight
        key = (held, held._version)
        if self._absorbed[0] is None or self._absorbed[0][0] is not held or self._absorbed[0][1] != key[1]:
            weight = self.kv_up.weight.detach().unflatten(0, (self.num_heads, -1))
            up_keys, up_values = weight.tensor_split([-self.value_dim], 1)
            self._absorbed = (key, ops.pack_linear(up_keys.mT), ops.pack_linear(up_values))
        return self._absorbed[1:]

    def make_cache(self) -> LayerCache:
        """Of latents and rotated keys, [.., 1, R + Dr]: the first R numbers are the values, too."""
        return LayerCache(value_width=self.kv_down.out_features - self.rope_dim)

    def _apply(self, fn, recurse=True):
        self._absorbed = (None, None, None)
        return super()._apply(fn, recurse)

    def __getstate__(self):
        return self.__dict__ | {"_absorbed": (None, None, None)}

    def extra_repr(self):
        return f"num_heads={self.num_heads}, rope_dim={self.rope_dim}, value_dim={self.value_dim}"
