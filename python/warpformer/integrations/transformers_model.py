"""What of a model of transformers is no layer: which attention function it calls, and its loss.

A patched model remembers what to undo in `vars(model)`.
"""

from inspect import unwrap

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss, ForMaskedLMLoss

from warpformer import ops
from warpformer.integrations.transformers import NAME
from warpformer.integrations.transformers_layers import replacement

__all__ = ["causal_lm_loss", "masked_lm_loss", "patch_model", "replacement", "unpatch_model"]

_ATTENTION, _LOSS = "_unpatched_attention", "_unpatched_loss"  # attributes of a patched model


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **ignored,
) -> Tensor:
    """The loss of transformers' ForMaskedLM on `ops.cross_entropy`."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(
        logits.float().view(-1, vocab_size),
        labels.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        reduction=reduction,
    )
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **ignored,
) -> Tensor:
    """The loss of transformers' ForCausalLM: that of the next token."""
    if shift_labels is None:
        shift_labels = pad(labels[..., 1:], (0, 1), value=ignore_index)
    return masked_lm_loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


_LOSSES = {ForCausalLMLoss: causal_lm_loss, ForMaskedLMLoss: masked_lm_loss}


def patch_model(module: nn.Module) -> list[tuple[str, str, str]]:
    """Has a model call `attention` and our loss: what each was, what it is, or why it was left alone."""
    if not isinstance(module, PreTrainedModel):
        return []
    return [*_patch_attention(module), *_patch_loss(module)]


def unpatch_model(module: nn.Module) -> None:
    """Undoes `patch_model`."""
    state = vars(module)
    if _ATTENTION in state:
        module.config._attn_implementation_internal = state.pop(_ATTENTION)
    if _LOSS in state:
        del state[_LOSS], state["_loss_function"]


def _patch_attention(model):
    before = model.config._attn_implementation
    if before == NAME:
        return []
    if not model._can_set_attn_implementation():
        return [(f"{before} attention", "", "it does not go through AttentionInterface")]
    if model.config.output_attentions:
        return [(f"{before} attention", "", "config.output_attentions asks for its weights")]
    if (device := model.device.type) not in ("cpu", "meta"):
        return [(f"{before} attention", "", f"on {device}: ours is of the CPU")]
    vars(model)[_ATTENTION] = before
    model.config._attn_implementation_internal = NAME
    return [(f"{before} attention", f"{NAME} attention", "")]


def _patch_loss(model):
    calls_it = "loss_function" in unwrap(type(model).forward).__code__.co_names
    before = LOSS_MAPPING.get(model.loss_type, ForCausalLMLoss)
    if not calls_it or before not in _LOSSES or _LOSS in vars(model):
        return []
    if "_loss_function" in vars(model):
        return [(before.__name__, "", "the model has a loss_function of its own")]
    vars(model)[_LOSS] = True
    model.loss_function = _LOSSES[before]
    return [(before.__name__, f"warpformer {before.__name__}", "")]
