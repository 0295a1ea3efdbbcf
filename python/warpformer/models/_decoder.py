"""What decoder-only models share: tokens in, layers one after the other, hidden states or logits out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer._C import InputError
from warpformer.generation import Generating
from warpformer.nn import Dropout, Embedding, KVCache, Linear, RotaryEmbedding, Sequences
from warpformer.ops._arguments import check_type


class Decoder(nn.Module):
    """A stack of layers over the packed tokens of sequences.

        x = embedding_scale tokens[input_ids] + positions[position_ids]
        x = layer(x) for each layer
        forward(...) = norm(x)

    Args:
        config: the fields of config.json.
        tokens: Embedding [V, C].
        layers: modules (x [N, C], sequences, cache of the layer) -> [N, C], each with an `attention`.
        norm: the last one.
        rotary: what the layers rotate by.
        positions: Embedding of learned positions.
        embedding_scale: rounded to the dtype of the embeddings.
        dropout: probability of a 0 in x before the layers, in training.
    """

    def __init__(
        self,
        config,
        tokens: Embedding,
        layers: Sequence[nn.Module],
        norm: nn.Module,
        *,
        rotary: RotaryEmbedding | None = None,
        positions: Embedding | None = None,
        embedding_scale: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.positions = positions
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary
        self.embedding_scale = embedding_scale
        self.dropout = Dropout(dropout)

    def make_cache(self, **options) -> KVCache:
        """For decoding: `model(new_tokens, cache=cache)`. Options are those of KVCache: dtype, max_tokens."""
        return KVCache([layer.attention.make_cache() for layer in self.layers], **options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            input_ids: [B, T] int64 or int32.
            attention_mask: [B, T] or, with a cache, [B, T' >= T] of which the last T columns count: nonzero =
                a token, 0 = padding, anywhere in a row; all tokens if None.
            position_ids: [B, T] or [1, T]; if None those of a row's tokens count from 0, or from the tokens
                that `cache` holds, whatever the padding.
            inputs_embeds: [B, T, C], in the place of input_ids.
            cache: from `make_cache`.

        Returns:
            [B, T, C], 0 where attention_mask is.

        Raises:
            InputError: an id is outside its table, a shape does not fit, not one of input_ids and
                inputs_embeds is given.
        """
        rows, sequences = self.forward_rows(
            input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, cache=cache
        )
        return sequences.pad(rows)

    def forward_rows(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        *,
        inputs_embeds=None,
        cache=None,
        head: nn.Module | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Sequences]:
        """`forward` without padding: [N, C], and whose rows these are. With a head, which is a module on this
        one, kept_logits(head.logits, ...) in the place of the rows."""
        given = tokens_of(input_ids, inputs_embeds)
        check_type("forward", "cache", cache, KVCache)
        sequences = Sequences.of_batch(given, attention_mask, position_ids, cache)

        def compute(tokens, sequences):
            rows = self.forward_packed(tokens, sequences, cache)
            return rows if head is None else kept_logits(head.logits, rows, sequences, logits_to_keep)

        if cache is None:
            return compute(sequences.pack(given), sequences), sequences
        limit = self.reserve(sequences.longest)
        out = cache.record(head or self, compute, given, sequences, limit, head is None, logits_to_keep)
        cache.advance()
        return out, sequences

    def reserve(self, longest: int) -> int | None:
        """Has positions for sequences of so many tokens; returns for how many, None for any number."""
        return None if self.rotary is None else self.rotary.reserve(longest)

    def forward_packed(self, tokens: Tensor, sequences: Sequences, cache: KVCache | None = None) -> Tensor:
        """Hidden states [N, C] of ids [N] or embeddings [N, C] of packed sequences."""
        x = self.dropout(self.embed(tokens, sequences.positions))
        if self.rotary is not None:
            sequences = self.rotary.prepare(sequences)
        for i, layer in enumerate(self.layers):
            x = layer(x, sequences, None if cache is None else cache.layers[i])
        return self.norm(x)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[N, C] of ids [N] or embeddings [N, C]."""
        x = tokens if tokens.ndim == 2 else self.tokens(tokens)
        if self.embedding_scale != 1.0:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype)
        return x if self.positions is None else x + self.positions(positions)


def tokens_of(input_ids: Tensor | None, inputs_embeds: Tensor | None, prefix: str = "") -> Tensor:
    """The one that is given, [B, T] or [B, T, C]; their names begin with `prefix`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError(f"a model takes one of {prefix}input_ids and {prefix}inputs_embeds")
    name, tokens, ndim = (
        ("input_ids", input_ids, 2) if inputs_embeds is None else ("inputs_embeds", inputs_embeds, 3)
    )
    if tokens.ndim != ndim or (ndim == 2 and tokens.is_floating_point()):
        raise InputError(
            f"{prefix}{name} = {tokens.dtype} {list(tokens.shape)} is not [B, T{', C' * (ndim - 2)}]"
        )
    return tokens


class CausalLM(Generating, nn.Module):
    """Logits of the next token.

        forward(...) = logit_scale lm_head(backbone(...)), with a softcap c: c tanh(logits / c)

    Args:
        backbone: a Decoder.
        config: with vocab_size, hidden_size, tie_word_embeddings.
    """

    def __init__(self, backbone: Decoder, config, *, bias: bool = False, logit_scale=1.0, softcap=0.0):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=bias)
        self.tied = {"lm_head": "backbone.tokens"} if config.tie_word_embeddings else {}
        if self.tied:
            self.lm_head.weight = backbone.tokens.weight
        self.logit_scale = logit_scale
        self.softcap = softcap

    def make_cache(self, **options) -> KVCache:
        return self.backbone.make_cache(**options)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits.

        Args:
            logits_to_keep: only those of the last so many tokens, not columns, of each sequence; all if 0.
            others: as the backbone has them.

        Returns:
            [B, T, V], 0 where attention_mask is; with logits_to_keep [B, logits_to_keep, V], 0 before the
            first token of a shorter sequence.
        """
        check_type("forward", "cache", cache, KVCache)
        if cache is not None and attention_mask is None and position_ids is None and inputs_embeds is None:
            logits = cache.again(input_ids, False, logits_to_keep)
            if logits is not None:
                return logits
        logits, _ = self.backbone.forward_rows(
            *(input_ids, attention_mask, position_ids),
            **dict(inputs_embeds=inputs_embeds, cache=cache, head=self, logits_to_keep=logits_to_keep),
        )
        return logits

    def logits(self, rows: Tensor) -> Tensor:
        """[..., V] of hidden states [..., C]."""
        logits = self.lm_head(rows)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return self.softcap * ops.activation(logits / self.softcap, "tanh") if self.softcap else logits


def kept_logits(logits: Callable[[Tensor], Tensor], rows: Tensor, sequences: Sequences, count: int) -> Tensor:
    """[B, count, V] of the last `count` tokens of each sequence, 0 before the first of a shorter one; of all,
    [B, T, V], 0 at padding, if `count` is 0."""
    if not count or (sequences.kept is None and count == sequences.shape[1]):
        return sequences.pad(logits(rows))
    last, there = sequences.last(count)
    kept = logits(rows[last.flatten()]).unflatten(0, last.shape)
    return kept if there is None else kept.masked_fill(~there[..., None], 0)
