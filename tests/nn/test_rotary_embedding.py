import pytest
import torch
from torch import nn

import warpformer as wf
from tests.check import same_bits

B, T, C, H = 2, 7, 32, 4


def test_rotates_as_the_op():
    layer = wf.nn.RotaryEmbedding(8, 20, theta=100.0, interleaved=True)
    query, key, positions = torch.randn(B, T, H, 8), torch.randn(B, T, 2, 8), torch.arange(3, 3 + T)
    tables = wf.ops.rope_tables(wf.ops.rope_frequencies(8, theta=100.0)[0], 20)
    expected = wf.ops.rope(query, *tables, key=key, positions=positions, interleaved=True)
    assert all(map(same_bits, layer(query, key, positions), expected))
    assert same_bits(layer(query, positions=positions), expected[0])
    assert not layer.state_dict()


def test_angles_stay_exact():
    layer = wf.nn.RotaryEmbedding(8, 20)
    cos = layer.cos.clone()
    assert same_bits(layer.bfloat16().cos, cos)


@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_attention_rotates_queries_and_keys(batch_first):
    rotary = wf.nn.RotaryEmbedding(C // H, 20)
    layer = wf.nn.MultiheadAttention(C, H, batch_first=batch_first, rotary=rotary).eval()
    tokens = torch.randn(B, T, C)
    x = tokens if batch_first else tokens.transpose(0, 1)
    q, k, v = nn.functional.linear(tokens, layer.in_proj_weight).unflatten(-1, (3, H, -1)).unbind(2)
    q, k = rotary(q, k)
    seen = wf.ops.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
    expected = layer.out_proj(seen.transpose(1, 2).flatten(2))
    out = layer(x, x, x, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(out if batch_first else out.transpose(0, 1), expected)


@torch.no_grad()
def test_layers_and_their_caches():
    rotary = wf.nn.RotaryEmbedding(C // H, 20)
    layer = wf.nn.TransformerDecoderLayer(C, H, 48, batch_first=True, rotary=rotary)
    decoder = wf.nn.TransformerDecoder(layer, 2).eval()
    tgt, memory, cache = torch.randn(B, T, C), torch.randn(B, 5, C), decoder.make_cache()
    whole = decoder(tgt, memory, tgt_mask=nn.Transformer.generate_square_subsequent_mask(T))
    steps = [decoder(tgt[:, t : t + 1], memory, cache=cache) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    assert "rotary" not in decoder.layers[0].multihead_attn._modules


@torch.no_grad()
def test_an_encoder_with_padding():
    layer = wf.nn.TransformerEncoderLayer(
        C, H, 48, batch_first=True, rotary=wf.nn.RotaryEmbedding(C // H, 20)
    )
    encoder = wf.nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(B, T, C), torch.arange(T) >= torch.tensor([T, 3])[:, None]
    out = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[1:, :3], encoder(x[1:, :3]))
