import pytest
import torch
from torch import nn

import warpformer as wf

B, T, S, C = 2, 5, 7, 16
OPTIONS = {
    "nhead": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dim_feedforward": 24,
    "dropout": 0.0,
}


@pytest.mark.parametrize("batch_first", [False, True])
def test_decoding_with_a_cache(batch_first):
    model = wf.nn.Transformer(C, batch_first=batch_first, **OPTIONS).eval()
    order = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    src, tgt = torch.randn(B, S, C), torch.randn(B, T, C)
    with torch.no_grad():
        whole = model(order(src), order(tgt), tgt_mask=model.generate_square_subsequent_mask(T))
        memory, cache = model.encoder(order(src)), model.decoder.make_cache()
        steps = [order(model.decoder(order(tgt[:, t : t + 1]), memory, cache=cache)) for t in range(T)]
    torch.testing.assert_close(torch.cat(steps, 1), order(whole))


def test_is_made_of_our_layers():
    model = wf.nn.Transformer(C, **OPTIONS)
    kinds = {type(module) for module in model.modules()} - {nn.ModuleList}
    assert all(kind.__module__.startswith("warpformer.nn") for kind in kinds)


def test_leaves_custom_parts_alone():
    layer = nn.TransformerEncoderLayer(C, 4, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1)
    model = wf.nn.Transformer(C, custom_encoder=encoder, batch_first=True, **OPTIONS)
    assert model.encoder is encoder
    assert type(encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder) is wf.nn.TransformerDecoder


def test_wrong_shapes():
    model = wf.nn.Transformer(C, **OPTIONS)
    src, tgt = torch.randn(S, B, C), torch.randn(T, B, C)
    for error in (RuntimeError, AssertionError):
        with pytest.raises(
            error, match=r"batches differ: src = float32\[7, 2, 16\], tgt = float32\[5, 1, 16\]"
        ):
            model(src, tgt[:, :1])
        with pytest.raises(error, match=r"d_model = 16: src = float32\[7, 2, 8\]"):
            model(src[..., :8], tgt[..., :8])
        with pytest.raises(
            error, match=r"not both 2-D or 3-D: src = float32\[7, 2, 16\], tgt = float32\[2, 16\]"
        ):
            model(src, tgt[0])
