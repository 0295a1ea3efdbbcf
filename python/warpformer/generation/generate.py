from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from warpformer.generation.beam_search import beam_search
from warpformer.generation.config import GenerationConfig, as_tuple, config_for, require
from warpformer.generation.decoding import Decoding
from warpformer.generation.sampling import Greedy, Sampler


class Streamer(Protocol):
    """What transformers' streamers are."""

    def put(self, value: Tensor): ...

    def end(self): ...


@torch.no_grad()
def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    seed: int | Sequence[int] | None = None,
    streamer: Streamer | None = None,
    **options,
) -> Tensor:
    """Tokens that a language or encoder-decoder model writes: greedily, by drawing, or by beam search.

    A row gives the same tokens alone and in any batch. Rows that have ended are not computed.

    Args:
        model: what `warpformer.load` returns of a causal or conditional-generation architecture, in eval
            mode; or any module with `make_cache` that takes what these take.
        input_ids: [B, T] int64 or int32: prompts, or what the encoder reads.
        attention_mask: [B, T], nonzero = a token, 0 = padding, anywhere in a row; all are tokens if None.
        seed: of the draws of row 0; row b has seed + b. Or one for each row. torch's generator gives one
            if None.
        streamer: its `put` gets the prompt, then each step's tokens [B]; then its `end` is called. Not with
            beams.
        options: those of `GenerationConfig`.

    Returns:
        [B, T + new] the prompts as given and what follows; of an encoder-decoder model [B, 1 + new], from
        decoder_start_token_id on. Rows that end before others have pad_token_id behind their end.

    Raises:
        InputError: an option is out of its range or contradicts another; a prompt is empty; an id is outside
            the vocabulary.
        TypeError: an option is not known.

    Source: transformers.GenerationMixin.generate.
    """
    config = config_for(model, options)
    check_prompt(input_ids, attention_mask)
    require(streamer is None or config.num_beams == 1, "a streamer cannot follow num_beams > 1")
    decoding = Decoding(model, input_ids, attention_mask, config)
    logits = decoding.begin()
    for name in ("eos_token_id", "pad_token_id"):
        for token in as_tuple(getattr(config, name)):
            require(
                token < logits.shape[1], f"{name} = {token} is not in the vocabulary of {logits.shape[1]}"
            )
    if config.num_beams > 1:
        new = beam_search(decoding, logits, config)
    else:
        choose = Sampler(config, seeds(seed, len(logits))) if config.do_sample else Greedy()
        new = write(decoding, logits, config, choose, streamer)
    return torch.cat([decoding.prompt, new.to(decoding.prompt.dtype)], 1)


class Generating:
    """What gives a model its `generate`."""

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options) -> Tensor:
        """Tokens: `warpformer.generate(self, ...)`."""
        return generate(self, input_ids, attention_mask, **options)


def check_prompt(input_ids, attention_mask):
    shape = list(input_ids.shape)
    require(input_ids.ndim == 2 and all(shape), f"input_ids = {shape} is not [B, T] with a row and a column")
    if attention_mask is not None:
        mask = list(attention_mask.shape)
        require(mask == shape, f"attention_mask = {mask} is not that of input_ids = {shape}")
        empty = (attention_mask == 0).all(1).nonzero().flatten().tolist()
        require(not empty, f"the prompts of rows {empty[:8]} are empty")


def seeds(seed, rows: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, Sequence):
        require(len(seed) == rows, f"there are {len(seed)} seeds of {rows} rows")
        return [*seed]
    return [*range(seed, seed + rows)]


def write(decoding: Decoding, logits: Tensor, config: GenerationConfig, choose, streamer) -> Tensor:
    """New tokens [B, new], one column after the other."""
    eos = torch.tensor(config.eos_token_ids, dtype=torch.int64, device=logits.device)
    batch = len(logits)
    rows = torch.arange(batch, device=logits.device)  # those that have not ended
    columns = []
    if streamer is not None:
        streamer.put(decoding.prompt.cpu())
    while True:
        tokens = choose(logits)
        column = tokens.new_full((batch,), config.padding).index_copy_(0, rows, tokens)
        columns.append(column)
        if streamer is not None:
            streamer.put(column.cpu())
        going = (~torch.isin(tokens, eos)).nonzero().flatten()
        if len(columns) == config.max_new_tokens or not len(going):
            break
        if len(going) < len(rows):
            rows, tokens = rows[going], tokens[going]
            decoding.reorder_(going)
            choose.keep_(going)
        logits = decoding.step(tokens)
    if streamer is not None:
        streamer.end()
    return torch.stack(columns, 1)
