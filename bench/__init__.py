"""Benchmarks: ours and the peers, interleaved in one process, as shares of this machine's own limits."""

from warpformer.bench._run import TORCH_AT, known_ops, run

__all__ = ["TORCH_AT", "known_ops", "run"]
