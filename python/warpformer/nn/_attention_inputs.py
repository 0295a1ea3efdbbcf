"""What torch.nn's attention layers take, checked and brought into the form of the op."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from warpformer._C import InputError
from warpformer.ops._arguments import require_tensor


class ArgumentError(InputError, AssertionError):
    """An argument that does not fit: what torch's layers raise as AssertionError or RuntimeError."""


def require(condition: bool, message: str):
    if not condition:
        raise ArgumentError(message)


def shape_of(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def as_batch(t: Tensor, batch_first: bool) -> Tensor:
    """[B, T, E] of that, of [T, B, E] or of unbatched [T, E]."""
    return t[None] if t.ndim == 2 else t if batch_first else t.transpose(0, 1)


def check_operands(
    query: Tensor, key: Tensor, value: Tensor, widths: tuple[int, int, int], batch_first: bool
):
    """query [T, E], key [S, kdim], value [S, vdim], or all of them with a batch."""
    for name, operand in (("query", query), ("key", key), ("value", value)):
        require_tensor(name, operand)
    batch = 0 if batch_first else 1
    if query.ndim not in (2, 3):
        problem = "query is neither unbatched (2-D) nor batched (3-D)"
    elif not key.ndim == value.ndim == query.ndim:
        problem = "key and value have not the dimensions of query"
    elif (query.shape[-1], key.shape[-1], value.shape[-1]) != widths:
        problem = f"the last dimensions are not (embed_dim, kdim, vdim) = {widths}"
    elif key.shape[:-1] != value.shape[:-1]:
        problem = "key and value have not the same tokens"
    elif query.ndim == 3 and query.shape[batch] != key.shape[batch]:
        problem = f"the batches (dim {batch}) differ"
    else:
        return
    shapes = f"query = {shape_of(query)}, key = {shape_of(key)}, value = {shape_of(value)}"
    raise ArgumentError(f"{problem}: {shapes}")


def check_mask(name: str, mask: Tensor | None, *allowed: tuple[int, ...]):
    if mask is None:
        return
    require_tensor(name, mask)
    require(
        mask.dtype == torch.bool or mask.is_floating_point(),
        f"only bool and floating types of {name} are supported, not {shape_of(mask)}",
    )
    require(
        tuple(mask.shape) in allowed,
        f"{name} = {shape_of(mask)} is not {' or '.join(str(list(shape)) for shape in allowed)}",
    )


_MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)
_causal = WeakIdKeyDictionary()  # mask -> (its version, whether it is causal)


def is_causal_mask(mask: Tensor) -> bool:
    """Whether query i sees exactly the keys up to i. A mask is read once, for all layers and steps; one that
    has no values, or none of a mask, is none."""
    require_tensor("mask", mask)
    if mask.is_meta or mask.ndim < 2 or mask.dtype not in _MASKS:
        return False
    if mask.is_inference():  # changes of it are not counted
        return _is_causal(mask)
    version, answer = _causal.get(mask, (None, False))
    if version != mask._version:
        answer = _is_causal(mask)
        _causal[mask] = (mask._version, answer)
    return answer


def _is_causal(mask):
    if mask.dtype == torch.bool:
        expected = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu_(1)
    else:
        expected = mask.new_full(mask.shape[-2:], -torch.inf).triu_(1)
    return torch.equal(mask, expected.expand_as(mask))


def check_causal_hint(mask: Tensor | None):
    """That a mask says what is_causal says; a graph that is being traced takes it as it comes."""
    if mask is not None and not torch.compiler.is_compiling():
        require(
            is_causal_mask(mask),
            f"is_causal = True, but the mask {shape_of(mask)} is another than the causal one",
        )


def merge_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int) -> Tensor | None:
    """torch.nn's masks (True = masked) as one of the op (True = keep), broadcastable to [B, H, T, S].

    Args:
        attn_mask: [T, S] or [B H, T, S], bool or additive.
        key_padding_mask: [B, S], bool or additive.
    """
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (-1, heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    given = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not given:
        return None
    hidden = [mask for mask in given if mask.dtype == torch.bool]
    added = [mask for mask in given if mask.dtype != torch.bool]
    if not added:
        return hidden[0].logical_not() if len(hidden) == 1 else torch.logical_or(*hidden).logical_not_()
    if not hidden:
        return sum(added[1:], added[0])
    return torch.where(hidden[0], -torch.inf, added[0])


def and_causal(mask: Tensor | None, queries: int, keys: int, past: int, device) -> Tensor:
    """The mask [.., T, S] with all keys masked that are later than their query, the first at key `past`."""
    later = torch.ones(queries, keys, dtype=torch.bool, device=device).triu(1 + past)
    if mask is None:
        return later
    return mask | later if mask.dtype == torch.bool else torch.where(later, -torch.inf, mask)


def with_keys(mask: Tensor | None, count: int) -> Tensor | None:
    """The mask with `count` more keys, which every query sees."""
    return mask if mask is None or count == 0 else F.pad(mask, (0, count))
