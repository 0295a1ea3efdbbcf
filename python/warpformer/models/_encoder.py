"""What encoders of BERT's form share, and their heads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.models._decoder import tokens_of
from warpformer.models._heads import Head
from warpformer.nn import Dropout, Embedding, LayerNorm, Linear, Sequences


class Output(NamedTuple):
    last_hidden_state: Tensor  # [B, T, C], 0 where attention_mask is
    pooler_output: Tensor | None  # [B, C]; None for a checkpoint without pooler


class Encoder(nn.Module):
    """A stack of layers over the packed tokens of sequences, which all see each other.

        x = norm(tokens[input_ids] + positions[position_ids + offset] + token_types[token_type_ids])
        last_hidden_state = layer(x) for each layer
        pooler_output = tanh(pooler(first token of last_hidden_state))

    Args:
        config: the fields of config.json.
        tokens, positions: Embedding [V, C] and [P, C].
        token_types: Embedding; None where the architecture has none.
        norm: of the sum.
        layers: modules (x [N, C], sequences) -> [N, C].
        pooler: Linear [C] to [C], or None.
        dropout: probability of a 0 after the norm, in training.
        position_offset: row of `positions` for position 0.
    """

    optional = ("pooler",)  # what a checkpoint may lack

    def __init__(
        self,
        config,
        tokens: Embedding,
        positions: Embedding,
        token_types: Embedding | None,
        norm: LayerNorm,
        layers: Sequence[nn.Module],
        pooler: Linear | None,
        *,
        dropout: float = 0.0,
        position_offset: int = 0,
    ):
        super().__init__()
        self.config = config
        self.tokens = tokens
        self.positions = positions
        self.token_types = token_types
        self.norm = norm
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.pooler = pooler
        self.position_offset = position_offset

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Output:
        """Hidden states of a padded batch.

        Args:
            input_ids: [B, T] int64 or int32.
            attention_mask: [B, T], nonzero = a token, 0 = padding, anywhere in the row; all tokens if None.
            token_type_ids: [B, T]; 0 if None.
            position_ids: [B, T] or [1, T]; if None a row's tokens count from 0, whatever the padding.
            inputs_embeds: [B, T, C], in the place of the rows that input_ids name.

        Raises:
            InputError: an id is outside its table, a shape does not fit, not one of input_ids and
                inputs_embeds is given.
        """
        rows, sequences = self.forward_rows(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds=inputs_embeds
        )
        pooled = None if self.pooler is None else self.pool(rows, sequences)
        return Output(sequences.pad(rows), pooled)

    def forward_rows(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        *,
        inputs_embeds=None,
    ) -> tuple[Tensor, Sequences]:
        """Hidden states without padding, [N, C], and whose rows these are."""
        given = tokens_of(input_ids, inputs_embeds)
        sequences = Sequences.of_batch(given, attention_mask, position_ids)
        types = None if token_type_ids is None else sequences.pack(token_type_ids.expand(sequences.shape))
        return self.forward_packed(sequences.pack(given), sequences, types), sequences

    def forward_packed(
        self, tokens: Tensor, sequences: Sequences, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states [N, C] of ids [N] or embeddings [N, C] of packed sequences; token_type_ids is [N]."""
        places = sequences.positions
        indices, tables = (
            [places + self.position_offset if self.position_offset else places],
            [self.positions],
        )
        if self.token_types is not None:
            indices.append(torch.zeros_like(places) if token_type_ids is None else token_type_ids)
            tables.append(self.token_types)
        if tokens.ndim == 1:
            indices.insert(0, tokens)
            tables.insert(0, self.tokens)
        x = ops.embedding_sum(indices, [table.weight for table in tables])
        x = self.norm(x) if tokens.ndim == 1 else self.norm(x, residual=tokens)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, sequences)
        return x

    def pool(self, rows: Tensor, sequences: Sequences) -> Tensor:
        """[B, C] of the first token of each sequence; of zeros where it is empty."""
        return self.pooler(first_tokens(rows, sequences), activation="tanh")


def first_tokens(rows: Tensor, sequences: Sequences) -> Tensor:
    """[B, C]; 0 for a sequence without tokens."""
    lengths = sequences.cu_seqlens.diff()
    if not len(rows):
        return rows.new_zeros(len(lengths), rows.shape[1])
    first = rows[sequences.first().clamp(max=len(rows) - 1)]
    return first if sequences.kept is None else first.masked_fill((lengths == 0)[:, None], 0)


class MaskedLM(Head):
    """Logits [B, T, V] of the token at every place, 0 at padding.

    decoder(norm(activation(dense(hidden)))), the weight of decoder being the table of tokens
    """

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.lm = MaskedLMHead(backbone, config)
        self.tied = {"lm.decoder": "backbone.tokens"} if config.tie_word_embeddings else {}

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of the backbone."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        return sequences.pad(self.lm(rows))


class MaskedLMHead(nn.Module):
    def __init__(self, backbone, config):
        super().__init__()
        width = config.hidden_size
        self.dense = Linear(width, width)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = Linear(width, config.vocab_size)
        if config.tie_word_embeddings:
            self.decoder.weight = backbone.tokens.weight
        self.activation = config.activation

    def forward(self, rows: Tensor) -> Tensor:
        return self.decoder(self.norm(self.dense(rows, activation=self.activation)))


class PooledClassifier(Head):
    """Logits [B, num_labels] of each sequence: classifier(dropout(pooler_output))."""

    needed = ("pooler",)

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.dropout = Dropout(config.classifier_dropout)
        self.classifier = Linear(config.hidden_size, config.num_labels)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of the backbone."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        return self.classifier(self.dropout(self.backbone.pool(rows, sequences)))


class FirstTokenClassifier(Head):
    """Logits [B, num_labels] of each sequence: out(activation(dense(first token)))."""

    activation = "tanh"

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.classifier_dropout)
        self.out = Linear(config.hidden_size, config.num_labels)

    def forward(self, *args, **kwargs) -> Tensor:
        """Arguments are those of the backbone."""
        rows, sequences = self.backbone.forward_rows(*args, **kwargs)
        hidden = self.dense(first_tokens(rows, sequences), activation=self.activation)
        return self.out(self.dropout(hidden))
