import pytest
import torch
from torch import nn

import warpformer as wf

B, T, S, C, H, FF = 3, 9, 6, 32, 4, 48


def decoder(batch_first=True, norm_first=False, layers=2):
    layer = wf.nn.TransformerDecoderLayer(C, H, FF, batch_first=batch_first, norm_first=norm_first)
    return wf.nn.TransformerDecoder(layer, layers, nn.LayerNorm(C)).eval()


def causal(count=T):
    return nn.Transformer.generate_square_subsequent_mask(count)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_as_torch(batch_first, norm_first):
    layer = nn.TransformerDecoderLayer(C, H, FF, batch_first=batch_first, norm_first=norm_first)
    theirs = nn.TransformerDecoder(layer, 2, nn.LayerNorm(C)).eval()
    ours = decoder(batch_first, norm_first)
    ours.load_state_dict(theirs.state_dict())
    tgt, memory = torch.randn(B, T, C), torch.randn(B, S, C)
    if not batch_first:
        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
    masks = {
        "tgt_mask": causal(),
        "memory_key_padding_mask": torch.arange(S) >= torch.tensor([2, 6, 4])[:, None],
    }
    masks["memory_key_padding_mask"] = masks["memory_key_padding_mask"].float() * -1e9
    torch.testing.assert_close(ours(tgt, memory, **masks), theirs(tgt, memory, **masks))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_cache_gives_what_recomputing_gives(batch_first, norm_first, padded):
    model = decoder(batch_first, norm_first)
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    tgt, memory = torch.randn(B, T, C), order(torch.randn(B, S, C))
    memory_padding = torch.arange(S) >= torch.tensor([2, 6, 4])[:, None] if padded else None
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, :2] = padded  # of prompts padded on the left, the first tokens see nothing
    masks = {"memory_key_padding_mask": memory_padding}
    whole = model(
        order(tgt),
        memory,
        tgt_mask=causal().isneginf(),
        tgt_key_padding_mask=padding if padded else None,
        **masks,
    )
    cache = model.make_cache()
    outputs, begin = [], 0
    for count in (3, 1, 1, 2, 1, 1):
        end = begin + count
        if padded:
            masks["tgt_key_padding_mask"] = padding[:, :end]
        outputs.append(order(model(order(tgt[:, begin:end]), memory, cache=cache, **masks)))
        begin = end
        assert cache.longest == end
    torch.testing.assert_close(torch.cat(outputs, 1), order(whole))


@torch.no_grad()
def test_reordered_cache():
    model = decoder()
    cache = model.make_cache()
    tgt, memory, index = torch.randn(B, T, C), torch.randn(B, S, C), torch.tensor([2, 2, 0, 1])
    model(tgt[:, :-1], memory, cache=cache)
    cache.reorder_(index)
    last = model(tgt[index, -1:], memory[index], cache=cache)
    whole = model(tgt, memory, tgt_mask=causal())
    torch.testing.assert_close(last, whole[index, -1:])


@torch.no_grad()
def test_a_cache_of_another_decoder():
    model = decoder()
    cache = model.make_cache()
    tgt, memory = torch.randn(B, 1, C), torch.randn(B, S, C)
    model(tgt, memory, cache=cache)
    with pytest.raises(wf.InputError, match="that of 2 layers, not 3"):
        decoder(layers=3)(tgt, memory, cache=cache)
    with pytest.raises(wf.InputError, match=r"attn_mask = float32\[1, 1\] is not \[1, 2\]"):
        model(tgt, memory, tgt_mask=torch.zeros(1, 1), cache=cache)


def test_caches_are_for_inference():
    model = decoder()
    with pytest.raises(wf.InputError, match="no_grad"):
        model(torch.randn(B, 1, C), torch.randn(B, S, C), cache=model.make_cache())
