# Written by `python -m tests.test_stubs`.
from __future__ import annotations

import collections.abc

import numpy
import torch

__all__: list[str] = [
    "Calls",
    "InputError",
    "activation",
    "activation_backward",
    "advise_huge_pages",
    "append_positions",
    "append_to_cache_",
    "best_isa",
    "cached_attention",
    "cached_attention_work",
    "copy_blocks_",
    "cross_entropy",
    "cross_entropy_backward",
    "cuda_architectures",
    "cuda_driver_version",
    "cuda_runtime_version",
    "dropout",
    "embedding_sum",
    "embedding_sum_backward",
    "end_own_threads",
    "grouped_linear",
    "grouped_linear_backward",
    "isa",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "linear_backward",
    "linear_workspace",
    "log_softmax",
    "log_softmax_backward",
    "pack_linear",
    "packed_size",
    "penalize",
    "rms_norm",
    "rms_norm_backward",
    "roofline",
    "rope",
    "sample",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_backward",
    "set_isa",
    "set_own_threads",
    "softmax",
    "softmax_backward",
    "sort_by_expert",
    "spread_rows",
    "sum_rows",
    "top_k",
    "unpack_linear",
]

class Calls:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def record(self) -> None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...

def activation(
    x: torch.Tensor | numpy.ndarray,
    up: torch.Tensor | numpy.ndarray | None,
    bias: torch.Tensor | numpy.ndarray | None,
    up_bias: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    activation: str,
    executor: int,
) -> None: ...
def activation_backward(
    grad: torch.Tensor | numpy.ndarray,
    x: torch.Tensor | numpy.ndarray,
    up: torch.Tensor | numpy.ndarray | None,
    bias: torch.Tensor | numpy.ndarray | None,
    up_bias: torch.Tensor | numpy.ndarray | None,
    dx: torch.Tensor | numpy.ndarray | None,
    dup: torch.Tensor | numpy.ndarray | None,
    dbias: torch.Tensor | numpy.ndarray | None,
    dup_bias: torch.Tensor | numpy.ndarray | None,
    partial: torch.Tensor | numpy.ndarray | None,
    activation: str,
    executor: int,
) -> None: ...
def advise_huge_pages(fresh: torch.Tensor | numpy.ndarray) -> None: ...
def append_positions(
    lengths: torch.Tensor | numpy.ndarray,
    cu_seqlens: torch.Tensor | numpy.ndarray | None,
    positions: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def append_to_cache_(
    key: torch.Tensor | numpy.ndarray,
    value: torch.Tensor | numpy.ndarray,
    key_cache: torch.Tensor | numpy.ndarray,
    value_cache: torch.Tensor | numpy.ndarray,
    lengths: torch.Tensor | numpy.ndarray,
    cu_seqlens: torch.Tensor | numpy.ndarray | None,
    block_table: torch.Tensor | numpy.ndarray | None,
    key_scales: torch.Tensor | numpy.ndarray | None,
    value_scales: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def best_isa() -> str: ...
def cached_attention(
    query: torch.Tensor | numpy.ndarray,
    key_cache: torch.Tensor | numpy.ndarray,
    value_cache: torch.Tensor | numpy.ndarray,
    lengths: torch.Tensor | numpy.ndarray,
    cu_seqlens_q: torch.Tensor | numpy.ndarray | None,
    block_table: torch.Tensor | numpy.ndarray | None,
    key_scales: torch.Tensor | numpy.ndarray | None,
    value_scales: torch.Tensor | numpy.ndarray | None,
    alibi_slopes: torch.Tensor | numpy.ndarray | None,
    sinks: torch.Tensor | numpy.ndarray | None,
    position_bias: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    lse: torch.Tensor | numpy.ndarray | None,
    work: torch.Tensor | numpy.ndarray | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    position_bidirectional: bool,
    position_max_distance: int,
    executor: int,
) -> None: ...
def cached_attention_work(
    query: torch.Tensor | numpy.ndarray,
    value_cache: torch.Tensor | numpy.ndarray,
    lengths: torch.Tensor | numpy.ndarray,
    block_table: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> int: ...
def copy_blocks_(
    cache: torch.Tensor | numpy.ndarray,
    old_blocks: torch.Tensor | numpy.ndarray,
    new_blocks: torch.Tensor | numpy.ndarray,
    count: int,
    executor: int,
) -> None: ...
def cross_entropy(
    x: torch.Tensor | numpy.ndarray,
    target: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray | None,
    loss: torch.Tensor | numpy.ndarray,
    dx: torch.Tensor | numpy.ndarray | None,
    work: torch.Tensor | numpy.ndarray,
    ignored: int,
    reduction: str,
    smoothing: float,
    z_loss: float,
    executor: int,
) -> None: ...
def cross_entropy_backward(
    dx: torch.Tensor | numpy.ndarray,
    grad: torch.Tensor | numpy.ndarray,
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def cuda_driver_version() -> int: ...
def cuda_runtime_version() -> int: ...
def dropout(
    x: torch.Tensor | numpy.ndarray,
    residual: torch.Tensor | numpy.ndarray | None,
    seed: torch.Tensor | numpy.ndarray,
    p: float,
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def embedding_sum(
    indices: collections.abc.Sequence[torch.Tensor | numpy.ndarray],
    tables: collections.abc.Sequence[torch.Tensor | numpy.ndarray],
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def embedding_sum_backward(
    grad: torch.Tensor | numpy.ndarray,
    index: torch.Tensor | numpy.ndarray,
    order: torch.Tensor | numpy.ndarray,
    dtable: torch.Tensor | numpy.ndarray,
    work: torch.Tensor | numpy.ndarray,
    padding: int,
    executor: int,
) -> None: ...
def end_own_threads() -> None: ...
def grouped_linear(
    x: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray,
    offsets: torch.Tensor | numpy.ndarray,
    bias: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    format: str,
    group_size: int,
    zero_points: bool,
    gated: bool,
    activation: str,
    workspace: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def grouped_linear_backward(
    grad: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray,
    offsets: torch.Tensor | numpy.ndarray,
    dx: torch.Tensor | numpy.ndarray,
    format: str,
    group_size: int,
    zero_points: bool,
    executor: int,
) -> None: ...
def isa() -> str: ...
def layer_norm(
    x: torch.Tensor | numpy.ndarray,
    residual: torch.Tensor | numpy.ndarray | None,
    weight: torch.Tensor | numpy.ndarray | None,
    bias: torch.Tensor | numpy.ndarray | None,
    sum: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    mean: torch.Tensor | numpy.ndarray | None,
    rstd: torch.Tensor | numpy.ndarray | None,
    eps: float,
    executor: int,
) -> None: ...
def layer_norm_backward(
    grad: torch.Tensor | numpy.ndarray,
    grad_sum: torch.Tensor | numpy.ndarray | None,
    z: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray | None,
    mean: torch.Tensor | numpy.ndarray,
    rstd: torch.Tensor | numpy.ndarray,
    dz: torch.Tensor | numpy.ndarray | None,
    dweight: torch.Tensor | numpy.ndarray | None,
    dbias: torch.Tensor | numpy.ndarray | None,
    partials: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def linear(
    x: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray,
    bias: torch.Tensor | numpy.ndarray | None,
    residual: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    format: str,
    group_size: int,
    zero_points: bool,
    gated: bool,
    activation: str,
    workspace: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def linear_backward(
    grad: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray,
    dx: torch.Tensor | numpy.ndarray,
    format: str,
    group_size: int,
    zero_points: bool,
    executor: int,
) -> None: ...
def linear_workspace(x: torch.Tensor | numpy.ndarray, format: str, executor: int) -> int: ...
def log_softmax(
    x: torch.Tensor | numpy.ndarray,
    mask: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    dim: int,
    scale: float,
    causal: bool,
    executor: int,
) -> None: ...
def log_softmax_backward(
    grad: torch.Tensor | numpy.ndarray,
    out: torch.Tensor | numpy.ndarray,
    dx: torch.Tensor | numpy.ndarray | None,
    dmask: torch.Tensor | numpy.ndarray | None,
    parts: torch.Tensor | numpy.ndarray | None,
    dim: int,
    scale: float,
    executor: int,
) -> None: ...
def pack_linear(
    weight: torch.Tensor | numpy.ndarray,
    scales: torch.Tensor | numpy.ndarray | None,
    zeros: torch.Tensor | numpy.ndarray | None,
    packed: torch.Tensor | numpy.ndarray,
    format: str,
    in_features: int,
    group_size: int,
    gated: bool,
    executor: int,
) -> None: ...
def packed_size(format: str, in_features: int, group_size: int, zero_points: bool) -> int: ...
def penalize(
    scores: torch.Tensor | numpy.ndarray,
    tokens: torch.Tensor | numpy.ndarray,
    first_new: torch.Tensor | numpy.ndarray,
    penalties: torch.Tensor | numpy.ndarray,
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def rms_norm(
    x: torch.Tensor | numpy.ndarray,
    residual: torch.Tensor | numpy.ndarray | None,
    weight: torch.Tensor | numpy.ndarray | None,
    sum: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    rstd: torch.Tensor | numpy.ndarray | None,
    eps: float,
    executor: int,
) -> None: ...
def rms_norm_backward(
    grad: torch.Tensor | numpy.ndarray,
    grad_sum: torch.Tensor | numpy.ndarray | None,
    z: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray | None,
    rstd: torch.Tensor | numpy.ndarray,
    dz: torch.Tensor | numpy.ndarray | None,
    dweight: torch.Tensor | numpy.ndarray | None,
    partials: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def roofline(limit: str, rounds: int, memory: torch.Tensor | numpy.ndarray, executor: int) -> float: ...
def rope(
    x: torch.Tensor | numpy.ndarray,
    key: torch.Tensor | numpy.ndarray | None,
    cos: torch.Tensor | numpy.ndarray,
    sin: torch.Tensor | numpy.ndarray,
    positions: torch.Tensor | numpy.ndarray | None,
    interleaved: bool,
    conjugate: bool,
    out: torch.Tensor | numpy.ndarray,
    key_out: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def sample(
    scores: torch.Tensor | numpy.ndarray,
    draws: torch.Tensor | numpy.ndarray | None,
    options: torch.Tensor | numpy.ndarray,
    tokens: torch.Tensor | numpy.ndarray | None,
    first_new: torch.Tensor | numpy.ndarray | None,
    penalties: torch.Tensor | numpy.ndarray | None,
    scratch: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def scaled_dot_product_attention(
    query: torch.Tensor | numpy.ndarray,
    key: torch.Tensor | numpy.ndarray,
    value: torch.Tensor | numpy.ndarray,
    mask: torch.Tensor | numpy.ndarray | None,
    cu_seqlens_q: torch.Tensor | numpy.ndarray | None,
    cu_seqlens_k: torch.Tensor | numpy.ndarray | None,
    alibi_slopes: torch.Tensor | numpy.ndarray | None,
    sinks: torch.Tensor | numpy.ndarray | None,
    position_bias: torch.Tensor | numpy.ndarray | None,
    biases: torch.Tensor | numpy.ndarray | None,
    seed: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    lse: torch.Tensor | numpy.ndarray | None,
    scale: float,
    softcap: float,
    bottom_right: bool,
    left: int,
    right: int,
    position_bidirectional: bool,
    position_max_distance: int,
    dropout_p: float,
    executor: int,
) -> None: ...
def scaled_dot_product_attention_backward(
    query: torch.Tensor | numpy.ndarray,
    key: torch.Tensor | numpy.ndarray,
    value: torch.Tensor | numpy.ndarray,
    mask: torch.Tensor | numpy.ndarray | None,
    cu_seqlens_q: torch.Tensor | numpy.ndarray | None,
    cu_seqlens_k: torch.Tensor | numpy.ndarray | None,
    alibi_slopes: torch.Tensor | numpy.ndarray | None,
    sinks: torch.Tensor | numpy.ndarray | None,
    position_bias: torch.Tensor | numpy.ndarray | None,
    biases: torch.Tensor | numpy.ndarray | None,
    seed: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    lse: torch.Tensor | numpy.ndarray,
    scale: float,
    softcap: float,
    bottom_right: bool,
    left: int,
    right: int,
    position_bidirectional: bool,
    position_max_distance: int,
    dropout_p: float,
    dout: torch.Tensor | numpy.ndarray,
    dlse: torch.Tensor | numpy.ndarray | None,
    dq: torch.Tensor | numpy.ndarray,
    dk: torch.Tensor | numpy.ndarray,
    dv: torch.Tensor | numpy.ndarray,
    dmask: torch.Tensor | numpy.ndarray | None,
    delta: torch.Tensor | numpy.ndarray,
    dposition_bias: torch.Tensor | numpy.ndarray | None,
    parts: torch.Tensor | numpy.ndarray | None,
    executor: int,
) -> None: ...
def set_isa(name: str) -> None: ...
def set_own_threads(threads: int) -> None: ...
def softmax(
    x: torch.Tensor | numpy.ndarray,
    mask: torch.Tensor | numpy.ndarray | None,
    out: torch.Tensor | numpy.ndarray,
    dim: int,
    scale: float,
    causal: bool,
    executor: int,
) -> None: ...
def softmax_backward(
    grad: torch.Tensor | numpy.ndarray,
    out: torch.Tensor | numpy.ndarray,
    dx: torch.Tensor | numpy.ndarray | None,
    dmask: torch.Tensor | numpy.ndarray | None,
    parts: torch.Tensor | numpy.ndarray | None,
    dim: int,
    scale: float,
    executor: int,
) -> None: ...
def sort_by_expert(
    expert_ids: torch.Tensor | numpy.ndarray,
    order: torch.Tensor | numpy.ndarray,
    places: torch.Tensor | numpy.ndarray,
    offsets: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def spread_rows(
    input: torch.Tensor | numpy.ndarray,
    order: torch.Tensor | numpy.ndarray,
    k: int,
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def sum_rows(
    rows: torch.Tensor | numpy.ndarray,
    weights: torch.Tensor | numpy.ndarray | None,
    places: torch.Tensor | numpy.ndarray,
    out: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def top_k(
    scores: torch.Tensor | numpy.ndarray,
    k: int,
    log_softmax: bool,
    values: torch.Tensor | numpy.ndarray,
    indices: torch.Tensor | numpy.ndarray,
    executor: int,
) -> None: ...
def unpack_linear(
    packed: torch.Tensor | numpy.ndarray,
    weight: torch.Tensor | numpy.ndarray,
    scales: torch.Tensor | numpy.ndarray | None,
    zeros: torch.Tensor | numpy.ndarray | None,
    index: torch.Tensor | numpy.ndarray | None,
    format: str,
    out_features: int,
    in_features: int,
    group_size: int,
    gated: bool,
    executor: int,
) -> None: ...

__version__: str
cuda_architectures: str

class InputError(ValueError, RuntimeError): ...
