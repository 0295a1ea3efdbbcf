"""Decoder-only models give transformers' logits, whole and cached, alone and in any batch."""

import importlib
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import warpformer as wf

from .checkpoints import DECODERS, GROUPED, padded_batch, positions, random_model, same

HEAD = {"GPT2": "LMHeadModel"}
ALL_EXPERTS = {  # where rounding chooses no other experts
    "mixtral": {"num_experts_per_tok": 5},
    "gpt-oss": {"num_experts_per_tok": 5},
    "deepseek-v2, lite": {"num_experts_per_tok": 6},
    "deepseek-v2": {"num_experts_per_tok": 6, "topk_group": 3},
}
MIXTURE = {  # as transformers' modules, not checkpoints, have them
    "router.weight": "mlp.gate.weight",
    "experts.gate_up.weight": "mlp.experts.gate_up_proj",
    "experts.down.weight": "mlp.experts.down_proj",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> the folder of its checkpoint, and transformers' model."""
    made = {}

    def get(name, head=None, **changes):
        key = (name, head, *sorted(changes))
        if key not in made:
            architecture, config = DECODERS[name]
            config = type(config).from_dict(config.to_dict() | changes)
            cls = getattr(transformers, architecture + (head or HEAD.get(architecture, "ForCausalLM")))
            made[key] = tmp_path_factory.mktemp("checkpoint"), random_model(cls, config)
            made[key][1].save_pretrained(made[key][0])
        return made[key]

    return get


each = pytest.mark.parametrize("name", DECODERS)


@torch.no_grad()
def expected(model, ids, mask):
    """Of each row as if it were alone: transformers' longrope looks at the longest row of a batch."""
    out = torch.zeros(*ids.shape, model.config.vocab_size)
    for row, kept in enumerate(mask.bool()):
        out[row, kept] = model(ids[row, kept][None]).logits[0].float()
    return out


@each
@torch.no_grad()
def test_logits(checkpoint, name):
    folder, theirs = checkpoint(name)
    ids, mask = padded_batch()
    model = wf.load(folder)
    found = model(ids, mask)
    same(found, expected(theirs, ids, mask), 2e-4)
    same(model(ids[:, :13]), expected(theirs, ids[:, :13], mask[:, :13] * 0 + 1), 2e-4)
    if name != "phi3, long":
        kept = mask.bool()
        theirs = theirs(ids, attention_mask=mask, position_ids=positions(mask)).logits
        same(found[kept], theirs[kept], 2e-4)
    assert not found[~mask.bool()].any()


@each
@torch.no_grad()
def test_bfloat16(checkpoint, name):
    folder, theirs = checkpoint(name, **ALL_EXPERTS.get(name, {}))
    ids, mask = padded_batch()
    found = wf.load(folder, dtype=torch.bfloat16)(ids, mask)
    assert found.dtype == torch.bfloat16
    exact = expected(theirs, ids, mask)
    options = {"experts_implementation": "eager"} if name in ALL_EXPERTS else {}
    rounded = type(theirs).from_pretrained(folder, dtype=torch.bfloat16, **options).eval()
    rounded = expected(rounded, ids, mask)
    same(found, exact, 2e-2)
    assert (found - exact).norm() <= 1.1 * (rounded - exact).norm()


@each
@torch.no_grad()
def test_cached_decoding(checkpoint, name):
    model = wf.load(checkpoint(name)[0])
    ids, mask = padded_batch(29)
    whole = model(ids, mask)
    cache, found = model.make_cache(), []
    for begin, end in [(0, 7), (7, 12), *((i, i + 1) for i in range(12, 29))]:
        found.append(model(ids[:, begin:end], mask[:, :end], cache=cache))
    if name == "phi3, long":  # the first tokens were no long sequence yet
        return same(torch.cat(found, 1)[:, :16], model(ids[:, :16], mask[:, :16]), 2e-5)
    same(torch.cat(found, 1), whole, 2e-5)
    assert cache.lengths.tolist() == mask.sum(1).tolist()
    return None


@torch.no_grad()
def test_reordered_cache(checkpoint):
    model = wf.load(checkpoint("mistral")[0])
    ids, mask = padded_batch()
    order = torch.tensor([2, 2, 0])
    cache = model.make_cache()
    model(ids, mask, cache=cache)
    cache.reorder_(order)
    found = model(ids[:, :1], cache=cache)
    again = model.make_cache()
    model(ids[order], mask[order], cache=again)
    assert torch.equal(found, model(ids[:, :1], cache=again))


@each
@torch.no_grad()
def test_a_shared_prefix_gives_the_same_bits_as_one_of_ones_own(checkpoint, name):
    """The last, partly filled block is copied; a window passes the prefix."""
    model = wf.load(checkpoint(name)[0])
    ids, mask = padded_batch()
    prefix = ids[:1, :11]
    shared, own = model.make_cache(block_size=4), model.make_cache(block_size=4)
    model(prefix, cache=shared)
    model(prefix.expand(3, -1), cache=own)
    fork = shared.fork([0, 0, 0])
    for part in (slice(0, 9), slice(9, 10), slice(10, 11)):
        steps = [model(ids[:, part], mask[:, : part.stop], cache=cache) for cache in (fork, own)]
        assert torch.equal(*steps)
    del fork  # the prefix is as it was
    again = model.make_cache(block_size=4)
    model(prefix, cache=again)
    assert torch.equal(model(ids[:1], cache=shared), model(ids[:1], cache=again))


@each
@torch.no_grad()
def test_tokens_taken_back(checkpoint, name):
    """As speculative decoding does it: each sequence keeps some of the tokens it was offered."""
    model = wf.load(checkpoint(name)[0])
    ids, mask = padded_batch()
    tried, never = model.make_cache(block_size=8), model.make_cache(block_size=8)
    for cache in (tried, never):
        model(ids, mask, cache=cache)
    model(ids[:, :6], cache=tried)
    tried.rewind_([6, 3, 1])
    offered = torch.arange(6) < torch.tensor([0, 3, 5])[:, None]
    model(ids[:, :6], offered, cache=never)
    assert tried.tokens.tolist() == never.tokens.tolist()
    assert torch.equal(model(ids[:, 7:8], cache=tried), model(ids[:, 7:8], cache=never))


@pytest.mark.parametrize("name", [n for n, (_, c) in DECODERS.items() if getattr(c, "sliding_window", None)])
@torch.no_grad()
def test_windows_give_the_same_bits_as_the_whole_cache(checkpoint, name):
    """Also where what they have passed is NaN."""
    model = wf.load(checkpoint(name)[0])
    ids, mask = padded_batch(40)
    sliding = model.make_cache(block_size=4)
    whole = wf.nn.KVCache([wf.nn.LayerCache() for _ in sliding.layers], block_size=4)
    for begin, end in [(0, 9), (9, 25), *((i, i + 1) for i in range(25, 40))]:
        given = ids[:, begin:end], mask[:, :end]
        assert torch.equal(*(model(*given, cache=cache) for cache in (sliding, whole)))
        for layer in sliding.layers:
            free = sliding.tables[layer.table].pool.users == 0
            layer.keys[torch.from_numpy(free)] = torch.nan
            layer.values[torch.from_numpy(free)] = torch.nan
    assert sliding.memory().held < whole.memory().held


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek-v2"])
@torch.no_grad()
def test_int8_cache(checkpoint, name):
    """The perplexity of the model's own greedy tokens is that of the float32 cache to 0.1 %."""
    model = wf.load(checkpoint(name)[0])
    ids = wf.generate(model, padded_batch(8)[0], max_new_tokens=32, eos_token_id=[])
    losses = []
    for dtype in (None, torch.int8):
        cache = model.make_cache(dtype=dtype)
        logits = [model(ids[:, i : i + 1], cache=cache) for i in range(ids.shape[1] - 1)]
        losses.append(wf.ops.cross_entropy(torch.cat(logits, 1).flatten(0, 1), ids[:, 1:].flatten()))
    assert cache.layers[0].keys.dtype == torch.int8
    assert 0 < (losses[1] - losses[0]).exp().sub(1).abs() < 1e-3


@torch.no_grad()
def test_cache_errors(checkpoint):
    model = wf.load(checkpoint("llama")[0])
    ids, _ = padded_batch()
    cache = model.make_cache()
    model(ids, cache=cache)
    with pytest.raises(wf.InputError, match="holds 3 sequences, and the batch has 2"):
        model(ids[:2], cache=cache)
    with torch.enable_grad(), pytest.raises(wf.InputError, match="for inference"):
        model(ids, cache=cache)


@each
@torch.no_grad()
def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(checkpoint, name):
    model = wf.load(checkpoint(name)[0])
    ids, mask = padded_batch()
    together = model(ids, mask)
    caches = model.make_cache()
    next_together = [model(ids, mask, cache=caches), model(ids[:, :1], cache=caches)][1]
    for row, kept in enumerate(mask.bool()):
        alone = ids[row, kept][None]
        assert torch.equal(model(alone)[0], together[row, kept])
        cache = model.make_cache()
        model(alone, cache=cache)
        assert torch.equal(model(ids[row : row + 1, :1], cache=cache)[0], next_together[row])


@each
@torch.no_grad()
def test_save_writes_what_transformers_wrote(checkpoint, name, tmp_path):
    folder, _ = checkpoint(name)
    model = wf.load(folder)
    wf.save(model, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    wf.save(model, tmp_path / "shards", max_shard_size=20_000)
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    ids, mask = padded_batch()
    assert torch.equal(wf.load(tmp_path / "shards")(ids, mask), model(ids, mask))


@torch.no_grad()
def test_inputs(checkpoint):
    folder, theirs = checkpoint("gemma2")
    model = wf.load(folder)
    ids, mask = padded_batch()
    embeds = theirs.model.embed_tokens.weight[ids]
    with pytest.raises(wf.InputError, match="one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embeds)
    with pytest.raises(wf.InputError, match="one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(wf.InputError, match=r"inputs_embeds = .* is not \[B, T, C\]"):
        model(inputs_embeds=embeds[0])
    with pytest.raises(wf.InputError, match=r"attention_mask = \[3, 20\] is no mask of tokens"):
        model(ids, mask[:, 1:])
    with pytest.raises(wf.InputError, match=r"0 <= id && id < end failed: .* end = 97"):
        model(ids + 50)
    assert torch.equal(model(inputs_embeds=embeds), model(ids))
    last = model(ids, mask, logits_to_keep=2)
    whole = model(ids, mask)
    assert torch.equal(last[0], whole[0, -2:])
    assert torch.equal(last[1], whole[1, -10:-8])
    assert torch.equal(last[2], whole[2, -2:])
    one = model(ids[:, :2], torch.tensor([[0, 1], [1, 1], [1, 0]]), logits_to_keep=2)
    assert not one[0, 0].any()
    assert not one[2, 0].any()
    assert one[:, 1].any(1).all()


@pytest.mark.parametrize(
    "head", ["Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"]
)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
@torch.no_grad()
def test_heads(checkpoint, name, head, tmp_path):
    changes = {} if head in ("Model", "ForQuestionAnswering") else {"num_labels": 3}
    architecture, _ = DECODERS[name]
    if not hasattr(transformers, architecture + head):
        return
    folder, theirs = checkpoint(name, head, **changes)
    ids, mask = padded_batch()
    model = wf.load(folder)
    found = model(ids, mask)
    theirs = theirs(ids, attention_mask=mask, position_ids=positions(mask))
    kept = mask.bool()
    if head == "Model":
        same(found[kept], theirs.last_hidden_state[kept], 2e-4)
    elif head == "ForSequenceClassification":
        # transformers finds the last token by its id, which is not that of padding here
        rows = [0, 2]
        same(found[rows], theirs.logits[rows], 2e-4)
    elif head == "ForTokenClassification":
        same(found[kept], theirs.logits[kept], 2e-4)
    else:
        same(found.start_logits[kept], theirs.start_logits[kept], 2e-4)
        same(found.end_logits[kept], theirs.end_logits[kept], 2e-4)
    wf.save(model, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert before.keys() == after.keys()


@each
def test_gradients(checkpoint, name):
    folder, theirs = checkpoint(name)
    ids, _ = padded_batch()
    model = wf.load(folder, trainable=True)
    model.eval()
    for each_model, logits in ((theirs, theirs(ids[:1]).logits), (model, model(ids[:1]))):
        each_model.zero_grad()
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    keys = importlib.import_module(type(model.backbone).__module__).KEYS
    reference = {key: p.grad for key, p in theirs.named_parameters()}
    for name_of, module in model.named_modules():
        if isinstance(module, wf.nn.FusedLinear):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name_of}.{leaf}"
            if full == "lm_head.weight" and full not in reference:
                continue
            grad = parameter.grad.mT if keys.is_transposed(full) else parameter.grad
            place, _, what = full.removeprefix("backbone.").partition(".feed_forward.")
            stacked = f"model.{place}.{MIXTURE.get(what)}"
            same(grad, reference[stacked if stacked in reference else keys.theirs(full)], 1e-4)


QUANTIZED = ["int8", {"mode": "int4", "group_size": 32}, {"mode": "int8", "tied": True}]


@pytest.mark.parametrize("name", ["llama-2, tied, biases", "mixtral", "deepseek-v2", "gpt2"])
@pytest.mark.parametrize("quantization", QUANTIZED, ids=str)
@torch.no_grad()
def test_quantized_as_it_is_read(checkpoint, name, quantization, tmp_path):
    folder, _ = checkpoint(name)
    model = wf.load(folder, quantization=quantization)
    options = {"mode": quantization} if isinstance(quantization, str) else quantization
    later = wf.load(folder)
    report = {row.name: row.note for row in wf.quantize_(later, **options)}
    ids, mask = padded_batch()
    assert torch.equal(model(ids, mask), later(ids, mask))
    is_tied = "lm_head" in model.tied
    assert (report["lm_head"] == "") == (not is_tied or bool(options.get("tied")))
    wf.save(model, tmp_path)
    assert torch.equal(wf.load(tmp_path)(ids, mask), model(ids, mask))


@torch.no_grad()
def test_dynamic_rope(tmp_path):
    """Beyond max_position_embeddings transformers' depend on the batch and on what was before."""
    rope = dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)
    config = transformers.LlamaConfig(**GROUPED, rope_parameters=rope)
    theirs = random_model(transformers.LlamaForCausalLM, config)
    theirs.save_pretrained(tmp_path)
    model = wf.load(tmp_path)
    ids = torch.randint(97, (2, 65))
    same(model(ids[:, :64]), theirs(ids[:, :64]).logits, 2e-4)
    with pytest.raises(wf.InputError, match=r"65 tokens is longer than .* = 64: .*'dynamic'"):
        model(ids)
    cache = model.make_cache()
    model(ids[:, :64], cache=cache)
    with pytest.raises(wf.InputError, match="65 tokens"):
        model(ids[:, 64:], cache=cache)
