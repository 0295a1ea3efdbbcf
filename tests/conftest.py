import gc
import io
import os
import signal
import sys
import zlib
from unittest import mock

import pytest
import torch

from warpformer import _C

try:
    from warpformer import _emulated
except ImportError:  # not built; tests/emulator fails then
    _emulated = None

pytest.register_assert_rewrite("tests.check")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
    torch.set_num_threads(2)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a job in the background, which tests interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16")  # worst to best
BEST = _C.isa()
WITH_CUDA_KERNELS = ("emulated", "cuda")
DEVICES = (
    *ISAS[: ISAS.index(BEST) + 1],
    *(["emulated"] if _emulated else []),
    *(["cuda"] if torch.cuda.is_available() and _C.cuda_runtime_version() else []),
)
if os.environ.get("WARPFORMER_ISA"):  # a run of its own for that one
    DEVICES = (BEST,)


@pytest.fixture(params=DEVICES)
def device(request):
    """Where tensors live, and what computes there; it is also the default device.

    One run of the test per instruction set of this CPU, and for an op with CUDA kernels two more:
    "emulated" takes CPU tensors to these kernels, run by tests/emulator in an order of threads that
    follows from the test's name (WARPFORMER_EMULATOR_SEED sets another one), those of an sm_80 or an
    sm_90 by its name too; "cuda", where there is a GPU, takes tensors on it.
    """
    if request.param == "emulated":
        name = request.node.nodeid
        with _cuda_kernels_for_cpu_tensors(_schedule(name), _capability(name)):
            yield torch.device("cpu")
    elif request.param == "cuda":
        with torch.device("cuda"):
            yield torch.device("cuda")
    else:
        _C.set_isa(request.param)
        yield torch.device("cpu")
        _C.set_isa(BEST)


def pytest_collection_modifyitems(config, items):
    """Tests on `emulated` and `cuda` are only for ops that have CUDA kernels: those in `_emulated`."""
    without = [item for item in items if _device_of(item) in WITH_CUDA_KERNELS and not _has_kernel(item)]
    config.hook.pytest_deselected(items=without)
    deselected = set(without)
    items[:] = [item for item in items if item not in deselected]


def pytest_collection_finish():
    """What imports and 30000 tests are made of stays to the end: a collection need not go through it, which
    takes a second."""
    gc.collect()
    gc.freeze()


def _device_of(item):
    return getattr(item, "callspec", None) and item.callspec.params.get("device")


def _has_kernel(item):
    """Whether the op of a test has CUDA kernels: that of its `sample` or else of its module, by name or `OP`.
    Where only some calls of an op have, its module says so by `has_cuda_kernel`. The number of threads is the
    CPU's alone."""
    if item.originalname.endswith("any_number_of_threads"):
        return False
    if item.originalname == "test_numpy" and _device_of(item) == "cuda":  # arrays lie on the host
        return False
    if says := getattr(item.module, "has_cuda_kernel", None):
        return bool(_emulated) and says(item.callspec.params)
    sample = item.callspec.params.get("sample")
    name = sample.__name__ if sample else item.module.__name__.rpartition(".test_")[2]
    return hasattr(_emulated, getattr(sample or item.module, "OP", name))


def _schedule(name):
    seed = zlib.crc32(name.encode())
    schedule = os.environ.get("WARPFORMER_EMULATOR_SEED") or ("fifo", "lifo", str(seed), str(seed))[seed % 4]
    print(f"WARPFORMER_EMULATOR_SEED={schedule}")  # pytest shows it where the test fails
    return schedule


def _capability(name):
    return (80, 90)[zlib.crc32(name.encode()) // 4 % 2]


def _cuda_kernels_for_cpu_tensors(schedule, capability):
    """`_C` with the kernels of `_emulated`. One that is not there fails: no test runs another by mistake."""
    _emulated.set_schedule(schedule)
    _emulated.set_compute_capability(capability)
    kernels = [name for name, value in vars(_C).items() if "executor: " in (value.__doc__ or "")]
    replaced = {name: getattr(_emulated, name, _missing(name)) for name in kernels}
    return mock.patch.multiple(_C, **replaced)


def _missing(name):
    def function(*args):
        raise NotImplementedError(f"{name} has no CUDA kernel")

    return function


@pytest.fixture(params=(torch.float32, torch.bfloat16, torch.float16), ids=("f32", "bf16", "f16"))
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def _same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    from warpformer import cli

    def run(*args, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["warpformer", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        monkeypatch.setattr(cli, "console", cli.Console(width=200))
        monkeypatch.setenv("COLUMNS", "200")
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status or 0, *capsys.readouterr()

    return run
