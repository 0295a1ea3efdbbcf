from pathlib import Path

import pytest
import torch
import transformers

import warpformer as wf
from tests.models.checkpoints import DECODERS, ENCODERS, SEQ2SEQ, random_model
from warpformer.bench import model_memory

DOCS = Path(__file__).parents[2] / "docs/models.md"
BILLIONS = {  # of parameters, as their authors tell
    "Llama-2-7b": 6.74,
    "Llama-3.1-8B": 8.03,
    "Mistral-7B-v0.1": 7.24,
    "Mixtral-8x7B-v0.1": 46.7,
    "Qwen2-7B": 7.62,
    "Qwen3-8B": 8.19,
    "gemma-2-9b": 9.24,
    "Phi-3-mini-4k-instruct": 3.82,
    "Minitron-4B-Base": 4.19,
    "gpt-oss-20b": 20.9,
    "DeepSeek-V2-Lite": 15.7,
    "DeepSeek-V2": 236,
    "grok-1": 314,
    "gpt2": 0.124,
    "mt5-small": 0.300,
    "bart-base": 0.139,
}


def test_the_table_is_what_the_command_prints():
    assert f"\n{model_memory.table()}\n" in DOCS.read_text()


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters(name):
    count = sum(p.numel() for p in model_memory.new_model(*model_memory.MODELS[name]).parameters())
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=0.006)


@pytest.mark.parametrize("mode", [None, "int8", "int4"])
@pytest.mark.parametrize(
    ("name", "head"),
    [
        *((name, "ForCausalLM") for name in ("llama-2, tied, biases", "mixtral", "gpt-oss", "deepseek-v2")),
        ("bert", "ForPreTraining"),
        ("t5", "ForConditionalGeneration"),
        ("bart", "ForConditionalGeneration"),
    ],
)
def test_bytes_are_those_of_a_loaded_model(name, head, mode, tmp_path):
    architecture, config = (DECODERS | ENCODERS | SEQ2SEQ)[name]
    random_model(getattr(transformers, architecture + head), config).save_pretrained(tmp_path)
    loaded = wf.load(tmp_path, dtype=torch.bfloat16, quantization=mode)
    model = model_memory.new_model(config.model_type, architecture + head, loaded.config.source)
    found = model_memory.held_bytes(model_memory.pack_(model, torch.bfloat16, mode))
    assert found == model_memory.held_bytes(loaded)
