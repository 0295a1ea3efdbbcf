"""What is asked of prompts, and how far they go on."""

import torch
from torch import Tensor

from warpformer.generation.checks import require
from warpformer.generation.config import NEW_TOKENS, GenerationConfig


def check_prompts(model, input_ids: Tensor, attention_mask: Tensor | None, prefix: str = ""):
    """That every row has a token, no more of them than the model reads, and all in its vocabulary.

    Args:
        prefix: of the names in messages.
    """
    shape, mask = list(input_ids.shape), None
    name = f"{prefix}input_ids"
    require(input_ids.ndim == 2 and all(shape), f"{name} = {shape} is not [B, T] with a row and a column")
    if attention_mask is not None:
        mask = attention_mask != 0
        require(
            list(mask.shape) == shape,
            f"{prefix}attention_mask = {list(mask.shape)} is not that of {name} = {shape}",
        )
        empty = (~mask).all(1).nonzero().flatten().tolist()
        require(not empty, f"the prompts of rows {empty[:8]} are empty")
    check_vocabulary(model, input_ids if mask is None else input_ids[mask], name)
    longest, length = shape[1] if mask is None else int(mask.sum(1).max()), longest_of(model)
    require(length is None or longest <= length, f"{name} has {longest} tokens, and the model reads {length}")


def check_vocabulary(model, tokens: Tensor, name: str):
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if name.startswith("decoder_"):
        size = getattr(config, "decoder_vocab_size", None) or size
    if size is not None:
        wrong = tokens[(tokens < 0) | (tokens >= size)][:8].tolist()
        require(not wrong, f"{name} has {wrong}, and the vocabulary tokens from 0 to {size - 1}")


def longest_of(model) -> int | None:
    """Tokens of a sequence that the model was made for; None without a limit."""
    return getattr(getattr(model, "config", None), "max_length", None)


def decoder_prompts(
    input_ids: Tensor,
    decoder_input_ids: Tensor | None,
    decoder_attention_mask: Tensor | None,
    first: int | None,
) -> tuple[Tensor, Tensor | None]:
    """What the decoder reads first, [B, P], and its mask: decoder_input_ids behind `first`, unless they begin
    with it."""
    if decoder_input_ids is None:
        require(first is not None, "neither the call nor the checkpoint has a decoder_start_token_id")
        return torch.full_like(input_ids[:, :1], first), None
    shape = list(decoder_input_ids.shape)
    require(shape[:-1] == [len(input_ids)], f"decoder_input_ids = {shape} is not [{len(input_ids)}, P]")
    mask = torch.ones_like(decoder_input_ids) if decoder_attention_mask is None else decoder_attention_mask
    if first is None or not shape[1]:
        return decoder_input_ids, decoder_attention_mask
    begins = decoder_input_ids.gather(1, (mask != 0).int().argmax(1, keepdim=True)) == first
    if bool(begins.all()):
        return decoder_input_ids, decoder_attention_mask
    require(not bool(begins.any()), f"decoder_input_ids begin with {first} in some rows and in others not")
    ids = torch.cat([torch.full_like(begins, first, dtype=decoder_input_ids.dtype), decoder_input_ids], 1)
    return ids, torch.cat([torch.ones_like(mask[:, :1]), mask], 1)


def limits_of(prompts: Tensor, config: GenerationConfig, longest: int | None) -> Tensor:
    """[R] the lengths at which rows with prompts of lengths [R] end. A model that reads so many tokens writes
    one more, at most."""
    if config.max_length is not None:
        limits = torch.full_like(prompts, config.max_length)
    else:
        limits = prompts + (config.max_new_tokens or NEW_TOKENS)
    if longest is not None:
        limits = limits.clamp(max=longest + 1)
    full = prompts[limits <= prompts]
    require(
        not len(full),
        f"max_length = {config.max_length} has no room behind prompts of {full[:8].tolist()} tokens",
    )
    return limits
