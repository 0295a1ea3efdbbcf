import contextlib
import importlib.util
import os
from pathlib import Path

import torch
from rich.console import Console

from warpformer.bench import roofline

FOLDER = Path(__file__).parent
SECONDS = 1.5  # a case, besides its warm-up
INTERRUPTED = 130
# What holds torch and its libraries to an instruction set, and CTranslate2; read when they load, so before
# `import torch`.
PEERS_AT = {
    isa: {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "CT2_FORCE_CPU_ISA": ctranslate2,
    }
    for isa, aten, onednn, mkl, ctranslate2 in (
        ("scalar", "default", "SSE41", "SSE4_2", "GENERIC"),
        ("avx2", "avx2", "AVX2", "AVX2", "AVX2"),
    )
}
TOOLS = ("roofline", "linear_sweep", "model_memory", "decode_step")
CPU_ONLY = (
    "encoder",
    "engine",
    "mixture_of_experts",
    "patch_",
    "sample",
    "sentence_encoder",
    "speculative_decoding",
    "top_k",
    "translation",
)


def known_ops():
    """Every file here that holds benchmarks."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if p.stem[0] != "_" and p.stem not in TOOLS)


def run(ops=(), *, device="cpu", isa=None, threads=None, json_path=None, data=None):
    """Measures `ops` (all if empty), prints tables, writes `json_path`; the whole of `warpformer bench`.

    Args:
        ops: names out of `known_ops()`; if empty, those that run on `device`.
        device: "cpu" or "cuda".
        isa: the instruction set that caps our kernels; torch's only where the environment has its
            `PEERS_AT`, as `warpformer bench` sees to.
        threads: of both; torch's number if None.
        json_path: where rows, limits and facts about the machine go.
        data: a .tsv file with English in its second column, for `sentence_encoder`; the repository's if None.

    Returns:
        The exit status: 0, 1 if a benchmark failed, 130 if interrupted. The rows measured are kept in all.

    Raises:
        ValueError: an op, the ISA or the number of threads does not exist, or the file has no folder.
        ModuleNotFoundError: the `bench` extra is not installed.
    """
    unknown = sorted(set(ops) - set(known_ops()))
    if unknown:
        raise ValueError(f"no benchmark for {', '.join(unknown)}; there are: {', '.join(known_ops())}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = cuda, but torch finds no GPU")
    if threads is not None and not 1 <= threads <= roofline.cores():
        raise ValueError(f"threads = {threads} is not between 1 and the {roofline.cores()} CPUs here")
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise ValueError(f"{json_path}: there is no such folder to write to")
    if not importlib.util.find_spec("pytest_benchmark"):
        raise ModuleNotFoundError("the benchmarks need pytest-benchmark: pip install warpformer[bench]")
    from warpformer.bench import _report

    console = Console()
    if not ops:
        ops = [op for op in known_ops() if device == "cpu" or op not in CPU_ONLY]
    with _on(device), roofline.isa(isa), _threads(threads):
        limits = roofline.limits(torch.get_num_threads())
        console.print(_report.limits_table(limits))
        recorder, interrupted = _measure(ops, data, console)
    rows, errors = recorder.rows, recorder.errors
    if rows:
        console.print(_report.rows_table(rows))
    for note in recorder.notes:
        console.print(note, style="yellow", markup=False, highlight=False)
    for error in errors:
        console.print(error, style="red", markup=False, highlight=False)
    if json_path:
        _report.write_json(json_path, limits, rows)
    return INTERRUPTED if interrupted else int(bool(errors))


def _measure(ops, data, console):
    import pytest

    from warpformer.bench._compare import Recorder
    from warpformer.bench._report import ProgressBar

    progress = ProgressBar(console)
    recorder = Recorder(SECONDS, data, progress)
    # The Recorder alone reports, and nothing of the folder that the command is called in takes part.
    options = f"""
        -c {os.devnull} --import-mode=importlib --assert=plain --capture=no
        -p no:terminal -p no:cacheprovider -W ignore::pytest.PytestWarning -o python_functions=bench_*
        --continue-on-collection-errors --benchmark-disable-gc --benchmark-quiet
        --benchmark-storage=file://{os.devnull}
    """.split()
    files = [str(FOLDER / f"{op}.py") for op in ops]
    try:
        status = pytest.main([*options, f"--rootdir={FOLDER}", *files], plugins=[recorder])
    finally:
        progress.stop()
    if status in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERNAL_ERROR):
        recorder.errors.append(f"pytest ended with {status!r}")
    return recorder, status == pytest.ExitCode.INTERRUPTED


@contextlib.contextmanager
def _on(device):
    """On a GPU in a stream of its own, which captures ask for, and a gradient for that of its forward."""
    if device == "cpu":
        yield
        return
    with torch.device(device), torch.cuda.stream(torch.cuda.Stream()):
        yield


@contextlib.contextmanager
def _threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
