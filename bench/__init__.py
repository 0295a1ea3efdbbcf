"""Benchmarks: ours and the peers, interleaved in one process, as shares of this machine's own limits."""

from warpformer.bench._run import PEERS_AT, known_ops, run

__all__ = ["PEERS_AT", "known_ops", "run"]
