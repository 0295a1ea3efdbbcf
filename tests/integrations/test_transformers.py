"""attn_implementation="warpformer": the attention function and the mask function."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache, masking_utils

from tests.check import relative_error
from tests.integrations.models import WINDOW, batch, make
from tests.process import run
from warpformer.integrations.transformers import attention, mask

CAUSAL, ENCODER = SimpleNamespace(is_causal=True), SimpleNamespace(is_causal=False)


def test_is_known_whichever_is_imported_first_and_imports_nothing():
    script = """
        import sys
        import {first}
        assert {first!r} == "transformers.modeling_utils" or "transformers" not in sys.modules
        import warpformer, transformers
        from transformers import AutoModel, BertConfig
        config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        print(AutoModel.from_config(config, attn_implementation="warpformer").config._attn_implementation)
    """
    assert run(script.format(first="warpformer")) == "warpformer"
    assert run(script.format(first="transformers.modeling_utils")) == "warpformer"


def operands(heads=4, kv_heads=2, queries=9, keys=9, width=16, **options):
    q = torch.randn(2, queries, heads, width).transpose(1, 2)
    k, v = (torch.randn(2, kv_heads, keys, width) for _ in range(2))
    return [t.requires_grad_(options.get("grad", False)) for t in (q, k, v)]


def reference(q, k, v, keep=None, scaling=None, softcap=None, bias=0.0, sinks=None):
    """[B, T, H, D] in float64, key heads repeated, every score in memory."""
    q, k, v = q.double(), *(t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores + bias
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def positions(queries, keys):
    return torch.arange(keys - queries, keys)[:, None], torch.arange(keys)


def check(out, expected):
    assert out[1] is None
    assert out[0].is_contiguous()
    assert relative_error(out[0].detach(), expected.detach()) < 1e-6


def test_causal_with_shared_key_heads_scaling_and_softcap():
    q, k, v = operands()
    i, j = positions(9, 9)
    out = attention(CAUSAL, q, k, v, None, scaling=0.3, softcap=1.5)
    check(out, reference(q, k, v, j <= i, 0.3, 1.5))
    check(attention(ENCODER, q, k, v, None), reference(q, k, v))
    check(attention(CAUSAL, q, k, v, None, is_causal=False), reference(q, k, v))


def test_prefill_of_a_static_cache_sees_the_first_keys():
    q, k, v = operands(queries=5, keys=12)
    used = k[:, :, :5], v[:, :, :5]
    check(attention(CAUSAL, q, k, v, None), attention(CAUSAL, q, *used, None)[0])


@pytest.mark.parametrize("queries", [1, 9])
def test_sliding_window(queries):
    q, k, v = operands(queries=queries, keys=9)
    i, j = positions(queries, 9)
    expected = reference(q, k, v, (j <= i) & (j > i - 4))
    check(attention(CAUSAL, q, k, v, None, sliding_window=4), expected)
    check(attention(CAUSAL, q, k, v, torch.ones(1, 4, 9, dtype=torch.bool)), expected)
    if queries > 1:
        check(attention(ENCODER, q, k, v, None, sliding_window=4), reference(q, k, v, (j - i).abs() < 4))


@pytest.mark.parametrize("queries", [1, 9])
def test_sinks(queries):
    """As gpt-oss has them, whose sinks are parameters in the dtype of the model."""
    q, k, v = operands(queries=queries, keys=9)
    sinks = torch.randn(4).bfloat16().requires_grad_()
    i, j = positions(queries, 9)
    expected = reference(q, k, v, (j <= i) & (j > i - 4), sinks=sinks)
    check(attention(CAUSAL, q, k, v, None, sliding_window=4, s_aux=sinks), expected)
    q.requires_grad_()
    out = attention(CAUSAL, q, k, v, None, sliding_window=4, s_aux=sinks)[0]
    own = torch.autograd.grad(out.sum(), (q, sinks))
    theirs = torch.autograd.grad(expected.sum(), sinks)
    torch.testing.assert_close(own[1], theirs[0], rtol=2e-2, atol=1e-3)


def test_masks_of_every_kind():
    q, k, v = operands()
    i, j = positions(9, 9)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :3] = False
    keep = padding[:, None, None] & (j <= i)
    check(attention(CAUSAL, q, k, v, keep), reference(q, k, v, keep).nan_to_num())
    check(attention(CAUSAL, q, k, v, padding), reference(q, k, v, keep).nan_to_num())
    check(attention(ENCODER, q, k, v, padding[:, None, None]), reference(q, k, v, padding[:, None, None]))
    added = torch.randn(2, 1, 9, 9)
    check(attention(CAUSAL, q, k, v, added), reference(q, k, v, bias=added))


def test_position_bias_with_every_mask():
    q, k, v = operands(kv_heads=4)
    bias = torch.randn(1, 4, 9, 9)
    i, j = positions(9, 9)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, 7:] = False
    added = torch.randn(2, 1, 9, 9)

    def ours(mask, module=CAUSAL):
        return attention(module, q, k, v, mask, position_bias=bias, scaling=1.0)

    check(ours(None), reference(q, k, v, j <= i, 1.0, bias=bias))
    check(ours(padding), reference(q, k, v, padding[:, None, None] & (j <= i), 1.0, bias=bias))
    check(ours(padding[:, None, None], ENCODER), reference(q, k, v, padding[:, None, None], 1.0, bias=bias))
    check(ours(added), reference(q, k, v, None, 1.0, bias=bias + added))


def test_gradients_and_dropout():
    q, k, v = operands(grad=True)
    i, j = positions(9, 9)
    own, theirs = (
        torch.autograd.grad(out.double().square().sum(), (q, k, v))
        for out in (attention(CAUSAL, q, k, v, None)[0], reference(q, k, v, j <= i))
    )
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(own, theirs, strict=True))
    out = attention(ENCODER, q, k, torch.ones_like(v), None, dropout=0.5)[0]
    assert out.std() > 0.1  # the sums of the weights that are left
    assert out.mean().item() == pytest.approx(1.0, abs=0.3)


def test_weights_are_refused():
    with pytest.raises(NotImplementedError, match="eager"):
        attention(CAUSAL, *operands(), None, output_attentions=True)
    model = make("llama", "warpformer")
    with pytest.raises(NotImplementedError, match="eager"):
        model(batch().ids, output_attentions=True)


# The mask function


def config_of(name, **options):
    config = make(name, "warpformer").config
    for key, value in options.items():
        setattr(config, key, value)
    return config


def causal(
    config, tokens=12, attention_mask=None, cache=None, create=masking_utils.create_causal_mask, **options
):
    return create(config, torch.zeros(2, tokens, 0), attention_mask, cache, **options)


def test_nothing_is_made_where_nothing_is_to_be_said():
    config = config_of("mistral")
    every = torch.ones(2, 12, dtype=torch.long)
    sliding = masking_utils.create_sliding_window_causal_mask
    assert causal(config) is None
    assert causal(config, attention_mask=every) is None
    assert causal(config, WINDOW, create=sliding) is None
    assert masking_utils.create_bidirectional_mask(config, torch.zeros(2, 12, 0), every) is None


def test_padding_takes_a_byte_per_token():
    config = config_of("mistral")
    tokens = torch.ones(2, 12, dtype=torch.long)
    tokens[0, :3] = 0
    found = causal(config, attention_mask=tokens)
    assert torch.equal(found, tokens.bool())
    found = masking_utils.create_bidirectional_mask(config, torch.zeros(2, 12, 0), tokens)
    assert torch.equal(found, tokens.bool()[:, None, None])
    found = causal(config, attention_mask=tokens, create=masking_utils.create_sliding_window_causal_mask)
    assert found.shape == (2, WINDOW, 12)
    assert found.untyped_storage().nbytes() <= 24


def test_other_masks_are_complete():
    """Packed sequences, functions of the user's, and callers that say they want all of it."""
    config = config_of("mistral")
    lower = torch.ones(12, 12, dtype=torch.bool).tril()
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    found = causal(config, position_ids=packed)
    assert torch.equal(found[0, 0], torch.block_diag(lower[:5, :5], lower[:7, :7]).bool())
    found = causal(config, and_mask_function=lambda b, h, q, k: q - k != 2)
    assert torch.equal(found[0, 0], lower & ~torch.ones(12, 12, dtype=torch.bool).tril(-2).triu(-2))
    assert torch.equal(causal(config, allow_is_causal_skip=False)[0, 0], lower)


def test_a_mask_can_be_made_of_its_own_result():
    """`generate` makes it for a static cache, and the model once more."""
    tokens = torch.ones(2, 12, dtype=torch.bool)
    tokens[0, :3] = False
    sliding = masking_utils.sliding_window_causal_mask_function(WINDOW)
    for function, kv_length, kv_offset in (
        (masking_utils.causal_mask_function, 20, 0),
        (sliding, 12, 0),
        (sliding, 8, 4),
    ):
        sizes = (2, 12 if kv_offset == 0 else 3, kv_length, 0 if kv_offset == 0 else 9, kv_offset, function)
        once = mask(*sizes, tokens, device="cpu")
        assert torch.equal(mask(*sizes, once, device="cpu"), once)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_several_tokens_after_a_cache(name, padding, kind):
    """As a dialogue goes on, or a draft is verified: queries that are neither all tokens nor one."""
    inputs = batch(padding)
    logits = []
    for implementation in ("eager", "warpformer"):
        model = make(name, implementation)
        arguments = {"max_cache_len": 20} if kind is StaticCache else {}
        cache = kind(config=model.config, **arguments)
        parts = []
        with torch.no_grad():
            for begin, end in ((0, 6), (6, 9), (9, 10), (10, 14)):
                kept = inputs.mask[:, :end]
                ids, places = inputs.ids[:, begin:end], (kept.cumsum(1) - 1).clamp(0)[:, begin:end]
                out = model(ids, attention_mask=kept, position_ids=places, cache=cache)
                parts.append(out.logits)
        logits.append(torch.cat(parts, 1)[inputs.mask == 1])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "t5"])
def test_compiles_without_a_break(name):
    torch.compiler.reset()
    inputs = batch("right")
    model = make(name, "warpformer")
    decoder = {"decoder_input_ids": inputs.ids} if model.config.is_encoder_decoder else {}
    arguments = {"input_ids": inputs.ids, "attention_mask": inputs.mask, "use_cache": False, **decoder}
    if name == "bert":
        del arguments["use_cache"]
    with torch.no_grad():
        expected = model(**arguments).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**arguments).logits
    torch.testing.assert_close(found[inputs.mask == 1], expected[inputs.mask == 1], rtol=1e-4, atol=1e-4)
