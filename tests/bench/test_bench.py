import json
import sys

import pytest
import torch

from warpformer import _C
from warpformer.bench import _compare, _run, known_ops, run

TINY = """
import pytest
import torch
from warpformer import ops

@pytest.mark.parametrize("columns", [256, 512])
def bench_tiny(compare, columns):
    row = compare(
        f"1024x{columns}",
        dtype=torch.float32,
        inputs=lambda: (torch.randn(1024, columns),),
        ours=ops.softmax,
        peers={"torch": lambda x: torch.softmax(x, -1)},
        moved=8 * 1024 * columns,
        flops=4 * 1024 * columns,
    )
    row["note"] = f"of {columns} columns"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place for benchmarks of a test's own: folder / "tiny.py" is the op "tiny"."""
    monkeypatch.setattr(_run, "FOLDER", tmp_path)
    monkeypatch.setattr(_run, "SECONDS", 0.1)
    monkeypatch.setattr(_compare, "WARM_UP_SECONDS", 0.03)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark would measure nothing
    yield tmp_path
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_rows_and_json(folder, capsys):
    (folder / "tiny.py").write_text(TINY)
    threads, isa = torch.get_num_threads(), _C.isa()
    assert run(["tiny"], threads=1, isa="scalar", json_path=folder / "result.json") == 0
    assert (torch.get_num_threads(), _C.isa()) == (threads, isa)
    printed = capsys.readouterr().out
    assert "1024x512" in printed
    assert "columns" in printed

    result = json.loads((folder / "result.json").read_text())
    assert list(result) == ["machine", "limits", "rows"]
    assert result["machine"].keys() >= {"cpu", "cores", "isa", "torch", "warpformer", "last_level_cache"}
    assert {"limit": "f32", "isa": "scalar", "threads": 1}.items() <= result["limits"][2].items()
    assert [row["case"] for row in result["rows"]] == ["1024x256", "1024x512"]
    for row, columns in zip(result["rows"], (256, 512), strict=True):
        assert (row["op"], row["dtype"], row["threads"], row["isa"]) == ("tiny", "float32", 1, "scalar")
        assert row["gb_per_s"] == pytest.approx(8 * 1024 * columns / row["ms"] / 1e6, rel=1e-3)
        assert row["gflop_per_s"] == pytest.approx(row["gb_per_s"] / 2, rel=1e-3)
        assert row["limit"] in ("read", "copy")
        assert 0 < row["share"] <= 1.2
        assert row["peers"].keys() == {"torch"}
        assert row["peers"]["torch"] > 0


def test_a_slower_peer_is_seen_as_slower(folder):
    (folder / "tiny.py").write_text(TINY.replace("lambda x: torch", "lambda x: x.sin().cos() * 0 + torch"))
    assert run(["tiny"], threads=1, json_path=folder / "result.json") == 0
    assert all(row["peers"]["torch"] > 1 for row in json.loads((folder / "result.json").read_text())["rows"])


def test_a_peer_that_computes_something_else_is_refused(folder, capsys):
    (folder / "tiny.py").write_text(TINY.replace("softmax(x, -1)", "softmax(x, 0)"))
    assert run(["tiny"], threads=1) == 1
    assert "torch does not compute what ours computes" in capsys.readouterr().out


def test_every_part_of_an_output_is_compared(folder, capsys):
    pairs = TINY.replace("ours=ops.softmax", "ours=lambda x: (ops.softmax(x), x)")
    (folder / "tiny.py").write_text(
        pairs.replace("lambda x: torch.softmax(x, -1)", "lambda x: (torch.softmax(x, -1), -x)")
    )
    assert run(["tiny"], threads=1) == 1
    assert "torch does not compute what ours computes" in capsys.readouterr().out


def test_limit_and_tolerance_of_a_row(folder):
    options = 'memory="copy",\n        tolerance=0.5,\n        flops'
    (folder / "tiny.py").write_text(
        TINY.replace("flops", options).replace("softmax(x, -1)", "softmax(x, -1) * 1.2")
    )
    assert run(["tiny"], threads=1, json_path=folder / "result.json") == 0
    assert {row["limit"] for row in json.loads((folder / "result.json").read_text())["rows"]} == {"copy"}


@pytest.mark.parametrize("failure", ["raise OSError('no such data')", "import no_such_module"])
def test_a_failure_is_reported_and_the_rest_is_kept(folder, capsys, failure):
    (folder / "broken.py").write_text(f"def bench_broken(compare):\n    {failure}\n")
    (folder / "tiny.py").write_text(TINY)
    assert run(json_path=folder / "result.json", threads=1) == 1
    assert failure.split()[-1].strip("')") in capsys.readouterr().out
    assert len(json.loads((folder / "result.json").read_text())["rows"]) == 2


def test_interrupted_run_keeps_its_rows(folder):
    (folder / "tiny.py").write_text(TINY)
    (folder / "zzz.py").write_text("def bench_interrupted():\n    raise KeyboardInterrupt\n")
    assert run(json_path=folder / "result.json", threads=1) == _run.INTERRUPTED
    assert len(json.loads((folder / "result.json").read_text())["rows"]) == 2


def test_known_ops_have_benchmarks():
    assert {"softmax", "sentence_encoder"} <= set(known_ops())
    assert "roofline" not in known_ops()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ops": ["sofmax"]}, "no benchmark for sofmax; there are: .*layer_norm.*softmax"),
        ({"isa": "avx3"}, 'isa "avx3" is none of: scalar'),
        ({"threads": 0}, "threads = 0"),
        ({"threads": 10**6}, "threads = 1000000"),
        ({"json_path": "/no/such/folder/result.json"}, "no such folder"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)


def test_missing_pytest_benchmark_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install warpformer\[bench\]"):
        run(["softmax"])
