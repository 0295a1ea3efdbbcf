"""Encoder-decoder models give transformers' logits, whole and cached, alone and in any batch."""

import importlib
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import warpformer as wf
from warpformer.models import transformer

from .checkpoints import SEQ2SEQ, UNTIED, padded_batch, random_model, same

LM = {"Marian": "MTModel"}
HEADS = [
    (name, head)
    for name in ("t5", "mt5", "bart", "mbart", "marian", "marian, two tables")
    for head in (
        "Model",
        "EncoderModel",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
    if hasattr(transformers, SEQ2SEQ[name][0] + head)
]
EOS = {"T5": 1, "MT5": 1}  # 2 of others

each = pytest.mark.parametrize("name", SEQ2SEQ)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """name -> the folder of its checkpoint, and transformers' model."""
    made = {}

    def get(name, head=None, **changes):
        key = (name, head, *sorted(changes))
        if key not in made:
            architecture, config = SEQ2SEQ[name]
            cls = getattr(
                transformers, architecture + (head or LM.get(architecture, "ForConditionalGeneration"))
            )
            options = config.to_dict() | changes
            if name.startswith("t5-1.1"):
                options["tie_word_embeddings"] = False
            model = random_model(cls, type(config).from_dict(options))
            if hasattr(model, "final_logits_bias"):
                model.final_logits_bias.normal_()
            if name in UNTIED and head is None:
                model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
            made[key] = tmp_path_factory.mktemp("checkpoint"), model
            model.save_pretrained(made[key][0])
        return made[key]

    return get


def batch():
    """The encoder's ids and mask, and the decoder's, which is not padded where that is."""
    ids, mask = padded_batch(21, 96)
    decoder_ids, decoder_mask = padded_batch(15, 90)
    return ids, mask, decoder_ids.flip(0), decoder_mask.flip(0)


def rows(ids, mask, decoder_ids, decoder_mask):
    """Of each sequence its number, and its tokens without padding."""
    for row in range(len(ids)):
        yield row, ids[row, mask[row].bool()][None], decoder_ids[row, decoder_mask[row].bool()][None]


@torch.no_grad()
def expected(model, *given):
    """Logits [N, V] of all sequences, each as if it were alone."""
    return torch.cat(
        [model(input_ids=ids, decoder_input_ids=other).logits[0] for _, ids, other in rows(*given)]
    )


@each
@torch.no_grad()
def test_logits(checkpoint, name):
    folder, theirs = checkpoint(name)
    given = batch()
    kept = given[-1].bool()
    model = wf.load(folder)
    found = model(*given)
    same(found[kept], expected(theirs, *given), 2e-4)
    assert not found[~kept].any()
    assert torch.equal(model(*given, logits_to_keep=1)[2, 0], found[2, -1])
    assert torch.equal(model(*given, logits_to_keep=2)[1], found[1, 5:7])


@each
@torch.no_grad()
def test_bfloat16(checkpoint, name):
    folder, theirs = checkpoint(name)
    given = batch()
    found = wf.load(folder, dtype=torch.bfloat16)(*given)[given[-1].bool()]
    assert found.dtype == torch.bfloat16
    exact = expected(theirs, *given)
    same(found, exact, 2e-2)
    rounded = expected(type(theirs).from_pretrained(folder, dtype=torch.bfloat16).eval(), *given)
    assert (found - exact).norm() <= 1.1 * (rounded - exact).norm()


@each
@torch.no_grad()
def test_cached_decoding(checkpoint, name):
    model = wf.load(checkpoint(name)[0])
    ids, mask, decoder_ids, decoder_mask = batch()
    whole = model(ids, mask, decoder_ids, decoder_mask)
    cache = model.make_cache()
    found = [model(ids, mask, decoder_ids[:, :3], decoder_mask[:, :3], cache=cache)]
    for begin, end in [(3, 6), (6, 8), *((i, i + 1) for i in range(8, 15))]:
        some = dict(decoder_input_ids=decoder_ids[:, begin:end], decoder_attention_mask=decoder_mask[:, :end])
        found.append(model(**some, cache=cache))
    same(torch.cat(found, 1), whole, 2e-5)
    assert cache.lengths.tolist() == decoder_mask.sum(1).tolist()


@each
@torch.no_grad()
def test_reordered_cache(checkpoint, name):
    """As beam search does it: each sequence becomes several, of which some go on."""
    model = wf.load(checkpoint(name)[0])
    ids, mask, decoder_ids, decoder_mask = batch()
    caches = model.make_cache(), model.make_cache()
    model(ids, mask, decoder_ids, decoder_mask, cache=caches[0])
    first, second = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 1, 3, 2, 4, 4])
    caches[0].reorder_(first)
    order = first[second]
    model(ids[order], mask[order], decoder_ids[order], decoder_mask[order], cache=caches[1])
    tokens = torch.arange(10, 22).view(6, 2)
    model(decoder_input_ids=tokens[:, :1], cache=caches[0])
    caches[0].reorder_(second)
    model(decoder_input_ids=tokens[second, :1], cache=caches[1])
    found, other = (model(decoder_input_ids=tokens[:, 1:], cache=cache) for cache in caches)
    assert torch.equal(found, other)


@each
@torch.no_grad()
def test_joined_caches(checkpoint, name):
    """As requests join a batch: each with what was encoded for it alone."""
    model = wf.load(checkpoint(name)[0])
    given = batch()
    together, joined = model.make_cache(), model.make_cache()
    model(*given, cache=together)
    empty = joined.fork([])
    for _, ids, decoder_ids in rows(*given):
        alone = empty.fork()
        model(ids, None, decoder_ids, cache=alone)
        joined.join_(alone)
    tokens = given[2][:, :1]
    assert torch.equal(*(model(decoder_input_ids=tokens, cache=cache) for cache in (together, joined)))
    del alone
    held = joined.memory().held
    joined.reorder_([1, 1])
    assert joined.memory().held < held
    model(decoder_input_ids=tokens[:2], cache=joined)
    joined.reorder_([])
    assert joined.memory().held == 0


@torch.no_grad()
def test_int8_cache(checkpoint):
    model = wf.load(checkpoint("bart")[0])
    given = batch()
    caches = model.make_cache(), model.make_cache(dtype=torch.int8)
    for cache in caches:
        model(*given, cache=cache)
    exact, found = (model(decoder_input_ids=given[2][:, :1], cache=cache) for cache in caches)
    same(found, exact, 2e-2)
    assert 0 < (found - exact).norm() < 1e-2 * exact.norm()
    assert caches[1].layers[0].cross_attention.keys.dtype == torch.int8


@each
@torch.no_grad()
def test_a_sequence_gives_the_same_bits_alone_and_in_any_batch(checkpoint, name):
    model = wf.load(checkpoint(name)[0])
    given = batch()
    together, cache = model(*given), model.make_cache()
    model(*given, cache=cache)
    following = model(decoder_input_ids=given[2][:, :1], cache=cache)
    for row, ids, decoder_ids in rows(*given):
        assert torch.equal(model(ids, None, decoder_ids)[0], together[row, given[-1][row].bool()])
        cache = model.make_cache()
        model(ids, None, decoder_ids, cache=cache)
        assert torch.equal(
            model(decoder_input_ids=given[2][row : row + 1, :1], cache=cache)[0], following[row]
        )


@pytest.mark.parametrize(("name", "head"), [(name, None) for name in SEQ2SEQ] + HEADS)
@torch.no_grad()
def test_save_writes_what_transformers_wrote(checkpoint, name, head, tmp_path):
    folder, _ = checkpoint(name, head)
    model = wf.load(folder)
    wf.save(model, tmp_path)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    before = {
        key: value for key, value in before.items() if "marian" not in name or "embed_positions" not in key
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert configs[0] == configs[1]
    if head is None:
        assert torch.equal(wf.load(tmp_path)(*batch()), model(*batch()))


@pytest.mark.parametrize(("name", "head"), HEADS)
@torch.no_grad()
def test_heads(checkpoint, name, head):
    eos = EOS.get(SEQ2SEQ[name][0], 2)
    folder, theirs = checkpoint(
        name, head, **({} if head in ("Model", "ForQuestionAnswering") else {"num_labels": 4})
    )
    ids, mask, *decoder = given = batch()
    ids[0, 4] = ids[0, 11] = ids[1, 3] = ids[2, 10] = eos
    model = wf.load(folder)
    if head == "Model":
        found, kept = model(*given), decoder[1].bool()
    elif head == "ForSequenceClassification":
        found = model(ids, mask)
        with pytest.raises(wf.InputError, match="has no eos_token_id"):
            model(ids[:, 12:], mask[:, 12:])
    else:
        found, kept = model(ids, mask), mask.bool()
    for row, tokens, decoder_ids in rows(*given):
        options = {"decoder_input_ids": decoder_ids} if head == "Model" else {}
        other = theirs(input_ids=tokens, **options)
        if head == "ForSequenceClassification":
            same(found[row], other.logits[0], 2e-4)
        elif head == "ForQuestionAnswering":
            same(found.start_logits[row, kept[row]], other.start_logits[0], 2e-4)
            same(found.end_logits[row, kept[row]], other.end_logits[0], 2e-4)
        else:
            same(found[row, kept[row]], other[0][0], 2e-4)


@each
def test_gradients(checkpoint, name):
    folder, theirs = checkpoint(name)
    given = batch()
    model = wf.load(folder, trainable=True).eval()
    labels = torch.arange(int(given[-1].sum())) % 90
    logits = [
        theirs(input_ids=ids, decoder_input_ids=other).logits[0].requires_grad_()
        for _, ids, other in rows(*given)
    ]
    theirs.zero_grad()
    F.cross_entropy(torch.cat(logits), labels).backward()
    F.cross_entropy(model(*given)[given[-1].bool()], labels).backward()
    keys = importlib.import_module(type(model.backbone).__module__).KEYS
    reference = {key: p.grad for key, p in theirs.named_parameters()}
    for key, gradient in stored_gradients(model):
        theirs_key = keys.theirs(key)
        if key.endswith(".k.bias"):  # 0 but for rounding: it moves all scores of a query alike
            assert max(gradient.abs().max(), reference[theirs_key].abs().max()) < 1e-6
        elif theirs_key in reference:
            same(gradient, reference[theirs_key], 1e-4)
        else:
            assert key in ("final_logits_bias", "lm_head.weight")


def stored_gradients(model):
    """By the names of the state_dict, the parts of a FusedLinear each for itself."""
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(module, wf.nn.FusedLinear):
                parts = parameter.grad.split(list(module.parts.values()))
                yield from (
                    (f"{name}.{part}.{leaf}", rows) for part, rows in zip(module.parts, parts, strict=True)
                )
            else:
                yield f"{name}.{leaf}".removeprefix("."), parameter.grad


@torch.no_grad()
def test_inputs(checkpoint):
    model = wf.load(checkpoint("bart")[0])
    ids, mask, decoder_ids, decoder_mask = given = batch()
    whole = model(*given)
    embeds, decoder_embeds = (
        model.backbone.embed(t.flatten(), model.backbone.encoder) for t in (ids, decoder_ids)
    )
    embeds = dict(inputs_embeds=embeds.view(3, 21, 48), decoder_inputs_embeds=decoder_embeds.view(3, 15, 48))
    assert torch.equal(model(None, mask, None, decoder_mask, **embeds), whole)
    with pytest.raises(wf.InputError, match="one of decoder_input_ids and decoder_inputs_embeds"):
        model(ids, mask)
    with pytest.raises(wf.InputError, match="one of input_ids and inputs_embeds"):
        model(decoder_input_ids=decoder_ids)
    with pytest.raises(wf.InputError, match="the encoder's batch is 2, and the decoder's is 3"):
        model(ids[:2], None, decoder_ids)
    cache = model.make_cache()
    with pytest.raises(wf.InputError, match="one of input_ids and inputs_embeds"):
        model(decoder_input_ids=decoder_ids, cache=cache)
    model(*given, cache=cache)
    with pytest.raises(wf.InputError, match="the cache holds what was encoded"):
        model(*given, cache=cache)
    empty = model(ids, mask * 0, decoder_ids)  # nothing was encoded
    assert torch.isfinite(empty).all()
    memory = model.encode(ids, mask)
    assert memory.rows.shape == (int(mask.sum()), 48)


def rewrite(checkpoint, folder, tensors, **config):
    """A copy of a checkpoint with changes."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((checkpoint / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


@torch.no_grad()
def test_checkpoints_as_others_wrote_them(checkpoint, tmp_path, caplog):
    """Tables under other names or several times, buffers that are computed, configs of older versions."""
    given = batch()

    def logits(name, tensors, **config):
        found = wf.load(rewrite(checkpoint(name)[0], tmp_path / "other", tensors, **config))(*given)
        assert "is not part of the model" not in caplog.text
        return found

    for name in ("t5-1.1", "t5-1.1, tied", "mt5", "bart", "marian"):
        folder, _ = checkpoint(name)
        expected, tensors = wf.load(folder)(*given), load_file(folder / "model.safetensors")
        prefix = "" if "t5" in name else "model."
        tensors[f"{prefix}encoder.embed_tokens.weight"] = tensors.pop(f"{prefix}shared.weight")
        tensors[f"{prefix}decoder.embed_tokens.weight"] = tensors[
            f"{prefix}encoder.embed_tokens.weight"
        ].clone()
        config = {}
        if name == "t5-1.1":
            tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(
                8, 4
            )
        if name.startswith("t5-1.1"):
            config = dict(tie_word_embeddings=False, scale_decoder_outputs=None)
        if name == "marian":
            tensors["model.encoder.embed_positions.weight"] = torch.ones(40, 48)
            tensors["lm_head.weight"] = tensors["model.encoder.embed_tokens.weight"].clone()
        if name == "bart":
            expected -= tensors.pop("final_logits_bias")
            tensors["model.encoder.version"] = torch.ones(1)
            same(logits(name, tensors)[given[-1].bool()], expected[given[-1].bool()], 1e-6)
        else:
            assert torch.equal(logits(name, tensors, **config), expected)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("t5", {"feed_forward_proj": "gated-gelu-new"}, r"'gated-gelu-new' is not \[gated-\]<name>"),
        ("t5", {"feed_forward_proj": "swoosh"}, "feed_forward_proj = 'swoosh' is none of"),
        ("t5", {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets = 2 is below 4"),
        ("t5", {"num_decoder_layers": 2000}, "num_decoder_layers = 2000 is over 1024"),
        (
            "bart",
            {"decoder_attention_heads": 5},
            "d_model = 48 is no multiple of decoder_attention_heads = 5",
        ),
        (
            "marian",
            {"decoder_layers": 3},
            r"'backbone\.decoder\.layers\.2\.attention_norm\.weight' is missing",
        ),
    ],
)
def test_impossible_config(checkpoint, tmp_path, name, changes, message):
    folder, _ = checkpoint(name)
    tensors = load_file(folder / "model.safetensors")
    with pytest.raises(wf.CheckpointError, match=message):
        wf.load(rewrite(folder, tmp_path, tensors, **changes))


@pytest.mark.parametrize("name", ["t5", "marian, two tables"])
@torch.no_grad()
def test_quantized(checkpoint, name):
    folder, _ = checkpoint(name)
    found, whole = wf.load(folder, quantization="int8")(*batch()), wf.load(folder)(*batch())
    same(found, whole, 5e-2)


@each
def test_new_models_train(checkpoint, name):
    """With dropout; every parameter gets a gradient, and steps along it make the loss smaller."""
    like = wf.load(checkpoint(name)[0])
    module = importlib.import_module(type(like.backbone).__module__)
    model = type(like)(module.Model(like.config), like.config)
    given, labels = batch(), torch.arange(45) % 90
    logits = model(*given)
    assert logits.requires_grad
    assert not torch.equal(logits, model(*given))
    assert logits.std() < 3
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.eval()(*given).flatten(0, 1), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert losses[-1] < losses[0]


TRANSFORMER = dict(
    vocab_size=97,
    d_model=48,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=80,
    decoder_ffn_dim=80,
    final_norm=True,
)


def transformers_of(**options):
    """Ours, and torch's of the same parameters."""
    config = transformer.Config(**TRANSFORMER | options)
    model = transformer.Model(config)
    options = dict(norm_first=config.norm_first, activation=config.activation, batch_first=True)
    theirs = torch.nn.Transformer(48, 4, 2, 3, 80, dropout=0.0, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    transformer.load_torch_(model, theirs)
    return transformer.ConditionalGeneration(model, config).eval(), theirs


def embedded(model, ids):
    """As the paper has it, and in float64."""
    places = torch.arange(ids.shape[1], dtype=torch.float64)[:, None]
    angles = places / 10000 ** (torch.arange(0, 48, 2, dtype=torch.float64) / 48)
    sinusoids = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
    return model.backbone.tokens.weight[ids] * 48**0.5 + sinusoids.float()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation_function", ["relu", "gelu"])
def test_transformer_is_that_of_torch(norm_first, activation_function):
    model, theirs = transformers_of(norm_first=norm_first, activation_function=activation_function)
    given = batch()
    losses = [F.cross_entropy(model(*given)[given[-1].bool()], torch.arange(32))]
    hidden = []
    for _, ids, decoder_ids in rows(*given):
        mask = theirs.generate_square_subsequent_mask(decoder_ids.shape[1])
        hidden.append(theirs(embedded(model, ids), embedded(model, decoder_ids), tgt_mask=mask)[0])
    logits = torch.cat(hidden) @ model.backbone.tokens.weight.T
    same(model(*given)[given[-1].bool()], logits, 2e-5)
    losses.append(F.cross_entropy(logits, torch.arange(32)))
    torch.testing.assert_close(*losses)
    tables = [
        torch.autograd.grad(loss, model.backbone.tokens.weight, retain_graph=True)[0] for loss in losses
    ]
    same(*tables, 1e-4)
    for loss in losses:
        loss.backward()
    with torch.no_grad():  # the gradients take the places of the parameters
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    ours = dict(stored_gradients(model.backbone))
    transformer.load_torch_(model.backbone, theirs)
    for key, gradient in model.backbone.state_dict().items():
        if key.endswith(".k.bias"):
            assert max(ours[key].abs().max(), gradient.abs().max()) < 1e-6
        elif key != "tokens.weight":
            same(ours[key], gradient, 1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": False},
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 99},
    ],
)
def test_transformer_round_trip(tmp_path, options):
    config = transformer.Config(**TRANSFORMER | {"final_norm": None} | options)
    model = transformer.ConditionalGeneration(transformer.Model(config), config).eval()
    assert model.backbone.encoder.norm is None
    wf.save(model, tmp_path)
    again = wf.load(tmp_path)
    assert torch.equal(again(*batch()), model(*batch()))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "transformer"
    cache = again.make_cache()
    ids, mask, decoder_ids, _ = batch()
    found = [again(ids, mask, decoder_ids[:, :1], cache=cache)]
    found += [again(decoder_input_ids=decoder_ids[:, i : i + 1], cache=cache) for i in range(1, 15)]
    same(torch.cat(found, 1), again(ids, mask, decoder_ids), 2e-5)


def test_parameters_of_another_transformer():
    model = transformer.Model(transformer.Config(**TRANSFORMER))
    theirs = torch.nn.Transformer(48, 4, 1, 3, 80, batch_first=True)
    with pytest.raises(wf.InputError, match=r"only one of the models has \['encoder\.layers\.1\."):
        transformer.load_torch_(model, theirs)
