"""What encoder-decoder models share: a sequence in, what a decoder makes of it out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from warpformer._C import InputError
from warpformer.models._decoder import kept_logits, tokens_of
from warpformer.nn import Dropout, Embedding, KVCache, Memory, Sequences, SinusoidalPositions
from warpformer.ops._arguments import check_type


class EncoderStack(nn.Module):
    """Layers over the packed tokens of sequences.

        x = dropout(embedding_norm(x + positions(sequences)))
        x = layer(x, sequences) for each layer
        forward(x, sequences) = norm_dropout(norm(x))

    Args:
        layers: modules (x [N, C], sequences) -> [N, C].
        tokens: Embedding of its own; None where encoder and decoder share one.
        positions: a module (sequences) -> [N, C], or None.
        embedding_norm, norm: of the embeddings and of the last layer, or None.
        dropout, norm_dropout: probabilities, in training.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        tokens: Embedding | None = None,
        positions: nn.Module | None = None,
        embedding_norm: nn.Module | None = None,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
        norm_dropout: float = 0.0,
    ):
        super().__init__()
        self.tokens = tokens
        self.positions = positions
        self.embedding_norm = embedding_norm
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.dropout = Dropout(dropout)
        self.norm_dropout = Dropout(norm_dropout)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        x = self.begin(x, sequences)
        for layer in self.layers:
            x = layer(x, sequences)
        return self.end(x)

    def begin(self, x: Tensor, sequences: Sequences) -> Tensor:
        if self.positions is not None:
            x = x + self.positions(sequences).to(x.dtype)
        return self.dropout(x if self.embedding_norm is None else self.embedding_norm(x))

    def end(self, x: Tensor) -> Tensor:
        return self.norm_dropout(x if self.norm is None else self.norm(x))


class DecoderStack(EncoderStack):
    """An EncoderStack of layers (x, sequences, memory, cache of the layer), which attend to a memory."""

    def forward(
        self, x: Tensor, sequences: Sequences, memory: Memory | None, cache: KVCache | None = None
    ) -> Tensor:
        x = self.begin(x, sequences)
        for i, layer in enumerate(self.layers):
            x = layer(x, sequences, memory, None if cache is None else cache.layers[i])
        return self.end(x)


class Seq2Seq(nn.Module):
    """An encoder of one sequence, and a decoder of another that attends to it.

        memory = encoder(embedding_scale tokens[input_ids])
        forward(...) = decoder(embedding_scale tokens[decoder_input_ids], memory)

    Args:
        config: the fields of config.json.
        encoder, decoder: EncoderStack and DecoderStack.
        tokens: Embedding [V, C] of both; None where each has its own.
        embedding_scale: of rows of the tables, not of embeddings that are given.
    """

    def __init__(
        self,
        config,
        encoder: EncoderStack,
        decoder: DecoderStack,
        tokens: Embedding | None = None,
        embedding_scale: float = 1.0,
    ):
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.encoder = encoder
        self.decoder = decoder
        self.embedding_scale = embedding_scale

    def make_cache(self, **options) -> KVCache:
        """For decoding: `model(ids, mask, first_tokens, cache=cache)`, and from then on
        `model(decoder_input_ids=new_tokens, cache=cache)`: it holds what was encoded. Options are those of
        KVCache: dtype, max_tokens."""
        return KVCache([layer.make_cache() for layer in self.decoder.layers], **options)

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Memory:
        """Hidden states of the encoder, without padding. Arguments are those of forward."""
        given = tokens_of(input_ids, inputs_embeds)
        sequences = Sequences.of_batch(given, attention_mask)
        return Memory(self.encode_packed(sequences.pack(given), sequences), sequences)

    def encode_packed(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        """Hidden states [N, C] of the encoder, of ids [N] or embeddings [N, C] of packed sequences."""
        return self.encoder(self.embed(tokens, self.encoder), sequences)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states of the decoder.

        Args:
            input_ids: [B, S] int64 or int32, of the encoder.
            attention_mask: [B, S], nonzero = a token, 0 = padding, anywhere in a row; all tokens if None.
            decoder_input_ids: [B, T]. A row's tokens have positions from 0 on, or from those that `cache`
                holds, whatever the padding.
            decoder_attention_mask: [B, T] or, with a cache, [B, T' >= T] of which the last T columns count.
            inputs_embeds: [B, S, C], in the place of input_ids.
            decoder_inputs_embeds: [B, T, C], in the place of decoder_input_ids.
            cache: from `make_cache`. Its first call has the encoder's input, later ones have none.

        Returns:
            [B, T, C], 0 where decoder_attention_mask is.

        Raises:
            InputError: an id is outside its table, a shape does not fit, the encoder's or the decoder's
                input is missing or there twice.
        """
        rows, sequences = self.forward_rows(
            *(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask),
            **dict(inputs_embeds=inputs_embeds, decoder_inputs_embeds=decoder_inputs_embeds, cache=cache),
        )
        return sequences.pad(rows)

    def forward_rows(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        *,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        cache=None,
        head: nn.Module | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, Sequences]:
        """`forward` without padding: [N, C], and whose rows these are. With a head, which is a module on this
        one, kept_logits(head.logits, ...) in the place of the rows."""
        given = tokens_of(decoder_input_ids, decoder_inputs_embeds, "decoder_")
        check_type("forward", "cache", cache, KVCache)
        sequences = Sequences.of_batch(given, decoder_attention_mask, cache=cache)
        memory = None
        if cache is None or not cache.holds_memory:
            memory = self.encode(input_ids, attention_mask, inputs_embeds)
        elif input_ids is not None or inputs_embeds is not None:
            raise InputError("the cache holds what was encoded: call the model without the encoder's input")

        def compute(tokens, sequences):
            rows = self.decode(tokens, sequences, memory, cache)
            return rows if head is None else kept_logits(head.logits, rows, sequences, logits_to_keep)

        if cache is None:
            return compute(sequences.pack(given), sequences), sequences
        limit = self.reserve(sequences.longest)
        out = cache.record(head or self, compute, given, sequences, limit, head is None, logits_to_keep)
        cache.advance()
        return out, sequences

    def reserve(self, longest: int) -> int | None:
        """Has positions for decoders of so many tokens; returns for how many, None for any number."""
        positions = self.decoder.positions
        return positions.reserve(longest) if isinstance(positions, SinusoidalPositions) else None

    def decode(
        self, tokens: Tensor, sequences: Sequences, memory: Memory | None, cache: KVCache | None = None
    ) -> Tensor:
        """Hidden states [N, C] of ids [N] or embeddings [N, C] of packed sequences; memory is None where
        `cache` holds it."""
        if memory is not None and memory.sequences.shape[0] != sequences.shape[0]:
            counts = memory.sequences.shape[0], sequences.shape[0]
            raise InputError("the encoder's batch is {}, and the decoder's is {}".format(*counts))
        if memory is not None and cache is not None:
            memory = Memory(memory.rows, cache.hold_memory(memory.sequences))
        return self.decoder(self.embed(tokens, self.decoder), sequences, memory, cache)

    def forward_shifted(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Memory, Tensor]:
        """What heads look at: the decoder's hidden states [N, C] of the encoder's tokens, each in the place
        of the next, behind `first_token`; the memory; and the tokens [N]."""
        memory = self.encode(input_ids, attention_mask)
        sequences = memory.sequences
        tokens = sequences.pack(input_ids)
        begins, ends = sequences.cu_seqlens[:-1].long(), sequences.cu_seqlens[1:].long()
        begins, ends = begins[begins < ends], ends[begins < ends]
        shifted = tokens.roll(1)
        shifted[begins] = self.first_token(tokens[ends - 1])
        return self.decode(shifted, sequences, memory), memory, tokens

    def first_token(self, last: Tensor) -> Tensor:
        """[B] what the decoder reads first, of the last tokens of the encoder."""
        if self.config.decoder_start_token_id is None:
            raise InputError("config.json has no decoder_start_token_id")
        return torch.full_like(last, self.config.decoder_start_token_id)

    def embed(self, tokens: Tensor, stack: EncoderStack) -> Tensor:
        """[N, C] of ids [N] or embeddings [N, C]."""
        if tokens.ndim == 2:
            return tokens
        x = (self.tokens if stack.tokens is None else stack.tokens)(tokens)
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale
