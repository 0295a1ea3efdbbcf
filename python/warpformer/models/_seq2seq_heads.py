"""What stands on an encoder-decoder model."""

import torch
from torch import Tensor, nn

from warpformer._C import InputError
from warpformer.generation import Generating
from warpformer.models._config import require
from warpformer.models._heads import Head, QuestionAnswering, Span
from warpformer.models._seq2seq import Seq2Seq
from warpformer.nn import Dropout, KVCache, Linear, Memory, Sequences
from warpformer.ops._arguments import check_type


class Seq2SeqLM(Generating, nn.Module):
    """Logits of the next token of the decoder: lm_head(backbone(...)).

    Args:
        backbone: a Seq2Seq.
        config: with hidden_size.
        tied: whether the weight of lm_head is the decoder's table of tokens.
    """

    def __init__(self, backbone: Seq2Seq, config, *, tied: bool):
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.table = "backbone.tokens" if backbone.decoder.tokens is None else "backbone.decoder.tokens"
        table = self.get_submodule(self.table)
        self.lm_head = Linear(config.hidden_size, table.num_embeddings, bias=False)
        self.tied = {"lm_head": self.table} if tied else {}
        if tied:
            self.lm_head.weight = table.weight

    def make_cache(self, **options) -> KVCache:
        return self.backbone.make_cache(**options)

    def encode(self, *args, **kwargs) -> Memory:
        return self.backbone.encode(*args, **kwargs)

    def forward(self, *args, logits_to_keep: int = 0, **kwargs) -> Tensor:
        """Logits [B, T, V], 0 where decoder_attention_mask is. Arguments are those of the backbone, and

        Args:
            logits_to_keep: only those of the last so many tokens of each sequence (not: columns), [B,
                logits_to_keep, V], 0 before the first token of a shorter one; of all if 0.
        """
        cache = kwargs.get("cache")
        check_type("forward", "cache", cache, KVCache)
        if cache is not None and not args and kwargs.keys() == {"decoder_input_ids", "cache"}:
            logits = cache.again(kwargs["decoder_input_ids"], False, logits_to_keep)
            if logits is not None:
                return logits
        return self.backbone.forward_rows(*args, **kwargs, head=self, logits_to_keep=logits_to_keep)[0]

    def logits(self, rows: Tensor) -> Tensor:
        """[..., V] of hidden states [..., C]."""
        return self.lm_head(rows)


class LastEosClassifier(Head):
    """Logits [B, num_labels] of the last eos_token_id of each sequence.

    out(dropout(tanh(dense(dropout(hidden)))))
    """

    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        require(type(config.eos_token_id) is int, f"eos_token_id = {config.eos_token_id} is not one token")
        self.dropout = Dropout(config.classifier_dropout)
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.out = Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Arguments are those of the backbone; the decoder reads what the encoder does."""
        rows, memory, tokens = self.backbone.forward_shifted(input_ids, attention_mask)
        hidden = rows[last_of(tokens == self.config.eos_token_id, memory.sequences)]
        return self.out(self.dropout(self.dense(self.dropout(hidden), activation="tanh")))


def last_of(found: Tensor, sequences: Sequences) -> Tensor:
    """[B] the last row of each sequence where `found` [N] is."""
    starts, ends = sequences.cu_seqlens[:-1].long(), sequences.cu_seqlens[1:].long()
    rows = torch.arange(len(found), device=found.device)
    latest = torch.where(found, rows, -1).cummax(0).values  # up to each row
    last = latest[(ends - 1).clamp(min=0)] if len(found) else starts - 1
    if bool((last < starts).any()):
        raise InputError("a sequence has no eos_token_id")
    return last


class ShiftedQuestionAnswering(QuestionAnswering):
    """Logits of the first and the last token of the answer, by a decoder that reads what the encoder does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Span:
        """Arguments are those of the backbone."""
        rows, memory, _ = self.backbone.forward_shifted(input_ids, attention_mask)
        return self.span(rows, memory.sequences)
