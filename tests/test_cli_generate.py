import json
import re
import signal
import subprocess
import sys

import pytest
import torch

import warpformer as wf
from tests.generation.text import TEXTS, save_language_model, save_translator
from warpformer import checkpoint
from warpformer.cli._generate import TimedStreamer, prompt_ids
from warpformer.scoring import perplexity
from warpformer.training import read_texts


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    return save_translator(tmp_path_factory.mktemp("translator"))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("language_model"))


LINES = [*TEXTS, "", "God"]
SHORT = ["--max-new-tokens", 12]
ASK = {"generate": ["--prompt", "In the"], "translate": ["In the"]}


@pytest.mark.parametrize(
    "options", [[], ["--beams", 1, "--batch-size", 2, "--quantization", "int8"]], ids=str
)
def test_translate(run, translator, options):
    status, out, _ = run(
        "translate", "--model", translator, *SHORT, *options, stdin="\n".join(LINES).encode() + b"\n"
    )
    assert status == 0
    quantization, beams = ("int8", 1) if options else (None, 4)
    expected = wf.Translator(translator, quantization=quantization)
    expected = expected.translate(LINES, num_beams=beams, max_new_tokens=12)
    assert out == "".join(" ".join(text.splitlines()) + "\n" for text in expected)


def test_translate_arguments(run, translator):
    status, out, _ = run("translate", *TEXTS[:2], "--model", translator, *SHORT)
    assert status == 0
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("command", ["generate", "translate", "perplexity", "embed", "chat"])
@pytest.mark.parametrize("device", ["cuda:99", "meta"])
def test_a_device_that_is_not_there(run, command, device):
    argument = {"perplexity": ["-"], "chat": ["--model", "none"]}.get(command, [])
    status, out, err = run(command, *argument, "--device", device)
    assert status == 1
    assert not out
    assert f"--device {device}: " in err


def test_generate(run, language_model):
    def text(*options, stdin=None):
        prompt = ["--prompt", "In the"] if stdin is None else []
        arguments = [*prompt, "--model", language_model, *SHORT, *options]
        status, out, _ = run("generate", *arguments, stdin=stdin or b"")
        assert status == 0
        return out

    greedy = text("--temperature", 0)
    assert greedy.startswith("In the")
    assert greedy == text("--temperature", 0) == text("--temperature", 0, stdin=b"In the\n")
    drawn = [text("--seed", seed, "--top-k", 50, "--top-p", 0.9) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text("--seed", 1) != text("--seed", 1, "--min-p", 0.5)
    assert greedy != text("--temperature", 0, "--repetition-penalty", 0.2)
    stop = greedy.strip()[-1]
    stopped = text("--temperature", 0, "--stop", "never comes", "--stop", stop)
    assert stopped.strip().endswith(stop)
    assert stopped.strip() == greedy[: greedy.index(stop, len("In the")) + 1]


def test_defaults_of_the_model(run, language_model, tmp_path):
    model = wf.load(language_model)
    model.generation_config = {"do_sample": True, "top_k": 1, "temperature": 0.7, "num_return_sequences": 1}
    wf.save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((language_model / "tokenizer.json").read_bytes())
    drawn = run("generate", "--prompt", "In the", "--model", tmp_path, *SHORT)[1]
    assert (
        drawn
        == run("generate", "--prompt", "In the", "--model", language_model, "--temperature", 0, *SHORT)[1]
    )


def test_statistics(run, language_model):
    arguments = ["generate", "--prompt", "In the", "--model", language_model, "--temperature", 0, *SHORT]
    status, text, err = run(*arguments)
    assert status == 0
    assert re.fullmatch(
        r"\d+ tokens read, [\d.]+ tokens/s; 12 written, [\d.]+ tokens/s; "
        r"weights [\d.]+ MB, at most \d+ MB in all\n",
        err,
    )
    status, out, err = run(*arguments, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["prompt"] + found["text"] + "\n" == text
    assert found["tokens"] == 12
    model = wf.load(language_model)
    assert found["weight_bytes"] == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert found["seconds"] > 0
    assert not found["interrupted"]


def test_interrupted(language_model):
    """Ctrl-C: what is written stays, and the numbers come."""
    command = [sys.executable, "-m", "warpformer", "generate", "--prompt", "In the"]
    command += ["--model", language_model, "--temperature", "0", "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(7).startswith("In the")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert out.endswith("\n")
    written = int(re.search(r"(\d+) written, ", err)[1])
    assert 0 < written < 2000  # the model ends at 2049


def test_interrupted_json(run, language_model, monkeypatch):
    put = TimedStreamer.put

    def interrupt(self, value):
        put(self, value)
        if len(self.tokens) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(TimedStreamer, "put", interrupt)
    status, out, _ = run("generate", "--prompt", "In the", "--model", language_model, "--json")
    found = json.loads(out)
    assert (status, found["interrupted"], found["tokens"]) == (130, True, 5)
    assert found["text"]


def test_perplexity(run, language_model, tmp_path):
    text = "\n".join([*TEXTS[:2], "", *TEXTS[2:]]) + "\n"
    (tmp_path / "text").write_text(text)
    options = ["--model", language_model, "--window", 20]
    status, out, _ = run("perplexity", tmp_path / "text", *options, "--json")
    assert status == 0
    found = json.loads(out)
    tokenizer = checkpoint.open_tokenizer(language_model)
    expected = perplexity(wf.load(language_model), tokenizer, read_texts(tmp_path / "text"), window=20)
    assert found["perplexity"] == pytest.approx(expected.perplexity)
    assert found["tokens"] == expected.tokens
    assert out == out.strip() + "\n"
    status, out, _ = run("perplexity", "-", *options, stdin=text.encode())
    assert out.startswith(f"perplexity {expected.perplexity:.3f} of a token, ")
    other = json.loads(run("perplexity", tmp_path / "text", *options, "--json", "--int8-cache")[1])
    assert 0 < abs(other["perplexity"] / found["perplexity"] - 1) < 0.01
    assert run("perplexity", "-", *options)[0] == 1


def test_prompts_begin_with_bos(language_model, tmp_path):
    model, tokenizer = wf.load(language_model), checkpoint.open_tokenizer(language_model)
    ids = tokenizer.encode("God").ids
    assert prompt_ids("God", tokenizer, model, language_model) == [1, *ids]
    assert prompt_ids("", tokenizer, model, language_model) == [1]
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert prompt_ids("God", tokenizer, model, tmp_path) == ids


@pytest.mark.parametrize("command", ["generate", "translate"])
def test_quantize(run, translator, language_model, tmp_path, command):
    folder = translator if command == "translate" else language_model
    (tmp_path / "model").mkdir()
    for path in folder.iterdir():
        (tmp_path / "model" / path.name).symlink_to(path)
    (tmp_path / "model" / "train.json").write_text("{}")
    out = tmp_path / "out"
    options = ["--to", "int4", "--group-size", 32, "--dtype", "bfloat16"]
    status, text, _ = run("quantize", tmp_path / "model", out, *options)
    assert status == 0
    assert "its weight is also that of" in text or command == "generate"
    files = {"config.json", "model.safetensors", "tokenizer.json", "train.json"}
    assert {path.name for path in out.iterdir()} == files
    dtypes = {parameter.dtype for parameter in wf.load(out).parameters()}
    assert dtypes == {torch.bfloat16}
    assert run(command, *ASK[command], "--model", out, *SHORT)[0] == 0


def test_models_of_the_package_are_the_default(run, translator, language_model, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "DATA", tmp_path)
    for command, name in (("generate", "language model"), ("translate", "translator")):
        status, _, err = run(command, *ASK[command])
        assert status == 1
        assert f"no {name} comes with this installation: give --model" in err
    (tmp_path / "translator").symlink_to(translator)
    (tmp_path / "language_model").symlink_to(language_model)
    for command in ("generate", "translate"):
        assert run(command, *ASK[command], *SHORT)[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "--prompt", "x", "--top-p", 2], "top_p = 2.0"),
        (
            ["generate", "--prompt", "x", "--temperature", 0, "--top-k", 5],
            "top_k = 5 counts with do_sample=True alone",
        ),
        (["translate", "x" * 100], "has 101 tokens, and the model reads 64"),
        (["translate", "x", "--beams", 1000], "num_beams = 1000 are too many"),
    ],
)
def test_errors(run, translator, language_model, args, message):
    model = language_model if args[0] == "generate" else translator
    status, _, err = run(*args, "--model", model)
    assert status == 1
    assert message in err


def test_wrong_models(run, translator, language_model):
    assert "is no language model" in run("generate", "--prompt", "x", "--model", translator)[2]
    assert "is not for conditional generation" in run("translate", "x", "--model", language_model)[2]
