from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from warpformer import ops
from warpformer.generation.decoding import Decoding
from warpformer.generation.rules import Rules


class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor): ...

    def end(self): ...


def write(
    decoding: Decoding,
    logits: Tensor,
    rules: Rules,
    choose: Callable[[Tensor], Tensor],
    streamer: Streamer | None,
) -> tuple[Tensor, Tensor | None]:
    """New tokens [R, new], and their log-probabilities if they are to be returned.

    Args:
        logits: [B, V] of the first new token; R = B num_return_sequences.
        choose: a Greedy or a Sampler, which gives tokens [R] of scores [R, V].
    """
    config = rules.config
    batch = len(logits) * config.num_return_sequences
    rows = torch.arange(batch, device=logits.device)  # those that have not ended
    columns, log_probs = [], []
    if streamer is not None:
        streamer.put(decoding.prompt.repeat_interleave(config.num_return_sequences, 0).cpu())
    if config.num_return_sequences > 1:
        decoding.repeat_(rows // config.num_return_sequences)
        logits = logits.repeat_interleave(config.num_return_sequences, 0)
    while True:
        tokens = choose(rules.scores(decoding.history, logits))
        columns.append(tokens.new_full((batch,), config.padding).index_copy_(0, rows, tokens))
        if config.return_dict_in_generate:
            chosen = ops.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]
            log_probs.append(chosen.new_zeros(batch).index_copy_(0, rows, chosen))
        if streamer is not None:
            streamer.put(columns[-1].cpu())
        history, index = decoding.history.append(tokens), None
        going = (~rules.ends(history)).nonzero().flatten()
        if not len(going):
            break
        if len(going) < len(rows):
            rows, history, index = rows[going], history.select(going), going
            choose.keep_(going)
        logits = decoding.step(history, index)
    if streamer is not None:
        streamer.end()
    return torch.stack(columns, 1), torch.stack(log_probs, 1) if log_probs else None
