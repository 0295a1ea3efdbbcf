"""The pytest plugin behind `warpformer bench`: a `compare` fixture, and the rows that it measures."""

import importlib
import itertools
from statistics import median
from time import perf_counter, sleep

import pytest
import torch

from warpformer import _C
from warpformer.bench import roofline

MAX_SETS = 256
WARM_UP_SECONDS = 0.3
LAP_SECONDS = 0.005
MIN_ROUNDS, MAX_ROUNDS = 5, 100
# Of calls of what has slept: until then its threads, which woke on one core, may share it.
WAKING_SECONDS = 0.1


class Lap:
    """Successive calls of one function, each on the next set of inputs. The outputs stay alive, so that
    they too are written to memory that no cache holds. On a GPU they may be one CUDA graph, so that neither
    Python nor launches count."""

    def __init__(self, function, sets, count):
        self.function, self.sets, self.count = function, sets, count
        self.outputs = [None] * count
        self.graph = None

    def __call__(self, calls):
        if self.graph is None:
            return self.call(calls)
        self.graph.replay()
        torch.cuda.synchronize()

    def capture(self, calls):
        """Has as many calls from now on as one graph."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self.run(calls)
        finally:
            graph.capture_end()
        self.graph = graph

    def call(self, calls):
        if not roofline.on_gpu():
            return self.run(calls)
        # The default device is a mode that sees every call of torch, microseconds each.
        with torch._C.DisableTorchFunction():
            self.run(calls)
        torch.cuda.synchronize()

    def run(self, calls):
        for _ in range(calls):
            i, inputs = next(self.sets)
            self.outputs[i] = self.function(*inputs)

    def seconds(self, calls):
        """Per call."""
        start = perf_counter()
        self(calls)
        return (perf_counter() - start) / calls

    def rest(self, seconds):
        rest(seconds, lambda: self.call(1))

    def warm_up(self):
        """Seconds per call, once they are steady."""
        end = perf_counter() + WARM_UP_SECONDS
        for _ in range(2 * self.count):
            seconds = self.seconds(1)
            if perf_counter() > end:
                break
        return seconds


def rest(seconds, call):
    """Until the threads of others have ceased to spin; then has those of `call` wake, on cores of their
    own."""
    if seconds:
        sleep(seconds)
        end = perf_counter() + WAKING_SECONDS
        while perf_counter() < end:
            call()


class Graph:
    """`function` of leaves that require gradients, under autograd: for benchmarks of its backward alone,
    which make one for each set of inputs."""

    def __init__(self, function, grad, *leaves):
        with torch.inference_mode(False):
            self.leaves = [t.clone().requires_grad_() for t in leaves]
            self.grad = grad.clone()
            self.output = function(*self.leaves)

    def gradients(self):
        with torch.inference_mode(False):
            return torch.autograd.grad(self.output, self.leaves, self.grad, retain_graph=True)


class Recorder:
    """Collects a row per `compare`, and a message per benchmark that failed.

    rows: what has been measured, complete at any time, so that an interrupted run keeps it.
    notes: what the rows lack, as peers that are not installed.
    """

    def __init__(self, seconds, data=None, progress=None):
        self.seconds, self.data_path, self.progress = seconds, data, progress
        self.rows, self.errors, self.notes = [], [], []

    @pytest.fixture
    def data(self):
        """The sentences that --data names; None for the repository's."""
        return self.data_path

    @pytest.fixture
    def peer(self):
        """peer(name): the module of bench/peers, or None and a note where its library is missing."""

        def peer(name):
            try:
                module = importlib.import_module(f"warpformer.bench.peers.{name}")
            except ModuleNotFoundError as missing:
                if missing.name.startswith("warpformer"):
                    raise
                self._note(f"no rows of {name}: {missing.name} is missing (pip install warpformer[peers])")
                return None
            if not module.is_held_to(_C.isa()):
                self._note(f"{name} uses instructions beyond {_C.isa()}")
            return module

        return peer

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)

    @pytest.fixture
    def compare(self, request, benchmark):
        """compare(case, dtype=, inputs=, ours=, peers=, moved=, flops=) measures one row, and returns it.

        dtype: of the case.
        inputs: makes one tuple of arguments, different at every call.
        ours, peers: a function of those arguments, and name -> function that does the same work.
        moved, flops: bytes and operations that one call takes at least.
        memory: the memory limit that holds, "copy" for what writes as it reads; the faster one if None.
        compute: the compute limit that holds; that of the dtype if None.
        rest: seconds before every lap, where a peer has threads of its own, which spin on after its work.
        tolerance: how far, in relative norm, a peer's results may be from ours.
        graph: whether all can be captured in CUDA graphs, which are then what is timed on a GPU.
        """

        def compare(
            case, *, dtype, inputs, ours, peers, moved, flops,
            memory=None, compute=None, rest=0, tolerance=0.02, graph=True,
        ):  # fmt: skip
            compute = compute or ("bf16" if dtype == torch.bfloat16 else "f32")
            _check_same_work(ours, peers, inputs(), tolerance)
            row = {"op": request.path.stem, "case": case, "dtype": str(dtype).removeprefix("torch.")}
            functions, work = (inputs, ours, peers), (moved, flops, memory, compute)
            row |= _measure(benchmark, self.seconds, *functions, *work, rest, graph and roofline.on_gpu())
            self.rows.append(row)
            return row

        with torch.inference_mode():
            yield compare

    def pytest_collection_finish(self, session):
        if self.progress:
            self.progress.start(len(session.items))

    def pytest_runtest_logstart(self, nodeid):
        if self.progress:
            self.progress.show(nodeid.partition(".py::")[0])

    def pytest_runtest_logfinish(self):
        if self.progress:
            self.progress.advance()

    def pytest_exception_interact(self, node, call):
        self.errors.append(f"{node.name}: {call.excinfo.exconly()}")


def _measure(benchmark, seconds, inputs, ours, peers, moved, flops, memory, compute, pause, graph):
    threads = torch.get_num_threads()
    limit, work = roofline.binding(moved, flops, compute, threads, memory)
    count = min(MAX_SETS, -(-roofline.past_cache() // moved))
    sets = itertools.cycle(enumerate([inputs() for _ in range(count)]))
    ours = Lap(ours, sets, count)
    peers = {name: Lap(peer, sets, count) for name, peer in peers.items()}

    own = ours.warm_up()
    calls = max(1, round(LAP_SECONDS / own))
    others = sum(peer.warm_up() for peer in peers.values())
    if graph:
        calls = -(-calls // count) * count  # all sets, so that none is in a cache when it comes again
        for lap in (ours, *peers.values()):
            lap.capture(calls)
    round_seconds = calls * (own + others) + (pause and pause + WAKING_SECONDS) * (2 + len(peers))
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(seconds / round_seconds)))

    beside = []  # seconds per call of the limit and of each peer, round by round

    def run_others():
        rest(pause, lambda: roofline.rate(limit, threads))
        times = {"limit": work / roofline.rate_now(limit, threads)}
        for name, peer in peers.items():
            peer.rest(pause)
            times[name] = peer.seconds(calls)
        beside.append(times)
        ours.rest(pause)

    benchmark.pedantic(ours, (calls,), setup=run_others, rounds=rounds, iterations=1)
    times = [t / calls for t in benchmark.stats.stats.data]

    def times_ours(name):
        return median(other[name] / t for other, t in zip(beside, times, strict=True))

    ms = 1e3 * median(times)
    return {
        "threads": threads,
        "isa": _C.isa(),
        "ms": ms,
        "gb_per_s": moved / ms / 1e6,
        "gflop_per_s": flops / ms / 1e6,
        "limit": limit,
        "share": times_ours("limit"),
        "peers": {name: times_ours(name) for name in peers},
        "rounds": rounds,
    }


def _check_same_work(ours, peers, inputs, tolerance):
    """A peer that computes something else is no peer: a mistake in a benchmark, not in a kernel."""
    own = _tensors(ours(*inputs))
    for name, peer in peers.items():
        other = _tensors(peer(*inputs))
        if len(own) != len(other) or not all(map(_agree, own, other, [tolerance] * len(own))):
            raise AssertionError(f"{name} does not compute what ours computes")


def _tensors(output):
    parts = output if isinstance(output, tuple) else (output,)
    return [torch.as_tensor(part).double() for part in parts]


def _agree(own, other, tolerance):
    return own.shape == other.shape and (own - other).norm() <= tolerance * other.norm()
