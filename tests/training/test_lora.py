"""Adapters of whole models: what trains, what is written, and what of it fits where."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import warpformer as wf
from tests.models.checkpoints import DECODERS, SEQ2SEQ, padded_batch, random_model, same
from warpformer.nn import Int4Linear, Int8Linear, Linear, LoRALinear, PackedLinear
from warpformer.training import add_lora_, load_lora_, lora_state, merge_lora_, save_lora

CLASSES = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bart": "BartForConditionalGeneration"}
KINDS = {"trainable": Linear, "packed": PackedLinear, "int8": Int8Linear, "int4": Int4Linear}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            import transformers

            made[name] = tmp_path_factory.mktemp("checkpoint")
            config = (DECODERS | SEQ2SEQ)[name][1]
            random_model(getattr(transformers, CLASSES[name]), config).save_pretrained(made[name])
        return made[name]

    return get


def load(folder, kind):
    options = {"trainable": {"trainable": True}, "packed": {}}
    quantization = {"mode": kind, "group_size": 32} if kind == "int4" else kind
    return wf.load(folder, **options.get(kind, {"quantization": quantization}))


def adapted(folder, kind, **options):
    torch.manual_seed(1)
    model = load(folder, kind)
    add_lora_(model, 4, 8.0, **options)
    for name, parameter in model.named_parameters():
        if ".B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model):
    ids, mask = padded_batch(15, 90)
    return model(ids, mask, ids) if hasattr(model, "encode") else model(ids, mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_only_adapters_train(checkpoint, name, kind):
    model = load(checkpoint(name), kind).train(False)
    before = logits(model).detach()
    names = add_lora_(model)
    same(logits(model).detach(), before, 1e-6)
    assert any(each.endswith("attention.qkv.q") or name == "gpt2" for each in names)
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert all(isinstance(adapter.base, KINDS[kind]) for adapter in adapters)
    trained = {p for adapter in adapters for p in (adapter.A, *adapter.B)}
    assert {p for p in model.parameters() if p.requires_grad} == trained
    logits(model).square().mean().backward()
    assert all(p.grad is not None for p in trained)
    assert all(p.grad is None for p in model.parameters() if p not in trained)


@pytest.mark.parametrize("kind", ["trainable", "packed", "int8", "int4"])
def test_gradients_are_those_of_merged_weights(checkpoint, kind):
    """Autograd of transformers' model whose weights are W + (alpha / rank) B A."""
    import transformers

    ours = adapted(checkpoint("llama"), kind)
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint("llama"))
    leaves, weights = {}, dict(theirs.named_parameters())
    state = lora_state(ours)
    prefix = "base_model.model."
    for layer, module in ours.named_modules():
        if isinstance(module, LoRALinear):
            rows = module.base.weight.detach().split([*module.rows.values()])
            for part, weight in zip(module.rows, rows, strict=True):
                name = wf.training.lora.their_name(ours, wf.training.lora.joined(layer, part))
                A, B = (state[f"{prefix}{name}.lora_{kind}.weight"].clone().requires_grad_() for kind in "AB")
                leaves[layer, part] = A, B
                weights[f"{name}.weight"] = weight.float() + 2.0 * B @ A
    if kind in ("int8", "int4"):
        weights["lm_head.weight"] = ours.lm_head.weight
    ids, _ = padded_batch(15, 90)
    expected = torch.func.functional_call(theirs, weights, (ids,)).logits
    found = ours(ids)
    same(found, expected, 1e-4)
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad)
    for (layer, part), (A, B) in leaves.items():
        module = ours.get_submodule(layer)
        at = module.adapted.index(part)
        same(module.A.grad.split(module.rank)[at], A.grad, 1e-4)
        same(module.B[at].grad, B.grad, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_saved_and_loaded(checkpoint, name, kind, tmp_path):
    model = adapted(checkpoint(name), kind)
    save_lora(model, tmp_path)
    again = load(checkpoint(name), kind).eval()
    names = load_lora_(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert len(names) == len(lora_state(model)) // 2
    assert lora_state(again).keys() == lora_state(model).keys()


def test_names_are_those_of_peft(checkpoint, tmp_path):
    model = adapted(checkpoint("llama"), "packed", targets=["*.attention.qkv.q", "*.down"])
    save_lora(model, tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    ends = ["lora_A.weight", "lora_B.weight"]
    names = ["self_attn.q_proj", "mlp.down_proj"]
    assert sorted(state) == sorted(
        f"base_model.model.model.layers.{i}.{name}.{end}" for i in range(3) for name in names for end in ends
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(f"model.layers.{i}.{name}" for i in range(3) for name in names)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)


@pytest.mark.parametrize("kind", ["trainable", "packed"])
@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_merged(checkpoint, name, kind, tmp_path):
    model = adapted(checkpoint(name), kind)
    expected, keys = logits(model), load(checkpoint(name), kind).state_dict().keys()
    with pytest.raises(wf.InputError, match="the model has adapters"):
        wf.save(model, tmp_path)
    merge_lora_(model)
    same(logits(model), expected, 1e-5)
    assert model.state_dict().keys() == keys
    wf.save(model, tmp_path)
    same(logits(wf.load(tmp_path)), expected, 1e-5)


def test_quantized_layers_are_not_merged(checkpoint):
    model = adapted(checkpoint("llama"), "int4")
    with pytest.raises(wf.InputError, match=r"layers\.0\.attention\.qkv is quantized to int4"):
        merge_lora_(model)
    assert lora_state(model)


@torch.no_grad()
def test_generation(checkpoint):
    """Adapters decode with a cache, as merged weights do."""
    model, (ids, mask) = adapted(checkpoint("llama"), "packed"), padded_batch(15, 90)
    found = model.generate(ids, mask, max_new_tokens=6)
    merge_lora_(model)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=6), found)


def test_a_step_of_training_lowers_the_loss(checkpoint):
    model = load(checkpoint("llama"), "int4")
    add_lora_(model)
    ids, _ = padded_batch(15, 90)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(wf.ops.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_models_of_ones_own(tmp_path):
    def make():
        torch.manual_seed(0)
        return torch.nn.Sequential(Linear(8, 8), torch.nn.ReLU(), Linear(8, 2))

    model = make()
    assert add_lora_(model, targets=["0", "2"]) == ["0", "2"]
    torch.nn.init.normal_(model[0].B[0])
    save_lora(model, tmp_path)
    again = make()
    load_lora_(again, tmp_path)
    assert torch.equal(again(torch.ones(8)), model(torch.ones(8)))
    with pytest.raises(wf.InputError, match="adapters already"):
        load_lora_(again, tmp_path)


@pytest.mark.parametrize("targets", ["*.query", ["*.down", "*.query"]])
def test_targets_that_fit_nothing(checkpoint, targets):
    with pytest.raises(wf.InputError, match=r"\*\.query"):
        add_lora_(load(checkpoint("llama"), "packed"), targets=targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"r": 0}, "r = 0"),
        ({"r": 5}, "is .4, 48., not .5, 48."),
        ({"lora_alpha": None}, "lora_alpha = None"),
    ],
    ids=str,
)
def test_other_adapters_are_refused(checkpoint, tmp_path, changes, message):
    save_lora(adapted(checkpoint("llama"), "packed"), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    model = load(checkpoint("llama"), "packed")
    with pytest.raises(wf.CheckpointError, match=message):
        load_lora_(model, tmp_path)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


def test_damaged_files(checkpoint, tmp_path):
    save_lora(adapted(checkpoint("llama"), "packed"), tmp_path)
    model, path = load(checkpoint("llama"), "packed"), tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    save_file(state | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 48)}, path)
    with pytest.raises(wf.CheckpointError, match=r"layers\.9\.mlp\.up_proj"):
        load_lora_(model, tmp_path)
    save_file({key: value for key, value in state.items() if "2.mlp.up_proj.lora_B" not in key}, path)
    with pytest.raises(wf.CheckpointError, match=r"lora_B of .*layers\.2\.feed_forward\.up\.up is None"):
        load_lora_(model, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(wf.CheckpointError, match="is damaged"):
        load_lora_(model, tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_lora_(model, tmp_path)
