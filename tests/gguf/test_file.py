"""GGUF files come from outside: whatever is in one, it is read or refused, and the tensor is named."""

import struct
from unittest import mock

import hypothesis.strategies as st
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Type
from hypothesis import given, settings

import warpformer as wf
from tests.gguf.files import LLAMA, quantized, write
from warpformer.gguf import _header, open_gguf

OTHERS = [
    ("general.name", "tiny"),
    ("tokenizer.ggml.tokens", ["a", "ß", ""]),
    ("tokenizer.ggml.scores", [0.5, -1.25, 1e-5]),
    ("tokenizer.ggml.token_type", [1, 2, 3]),
    ("tokenizer.ggml.bos_token_id", 7),
    ("tokenizer.ggml.add_bos_token", True),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    tensors = {
        "token_embd.weight": np.ones((10, 64), np.float32),
        "blk.0.attn_v.weight": quantized((32, 64), Type.Q8_0),
        "blk.0.ffn_up.weight": quantized((96, 64), Type.Q4_0),
    }
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors, others=OTHERS)


def test_metadata(path):
    metadata = open_gguf(path).metadata
    assert metadata == {
        "general.architecture": "llama",
        **{f"llama.{key}": value for key, value in LLAMA.items()},
        **dict(OTHERS),
    }


def test_a_large_vocabulary_is_read_at_once(tmp_path):
    words = [f"word {i}" for i in range(200000)]
    found = open_gguf(write(tmp_path / "large.gguf", {}, others=[("tokenizer.ggml.tokens", words)]))
    assert found.metadata["tokenizer.ggml.tokens"] == words


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf is missing"):
        open_gguf(tmp_path / "none.gguf")


def refused(tmp_path, data, message):
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(wf.CheckpointError, match=message) as error:
        open_gguf(tmp_path / "bad.gguf")
    assert "bad.gguf: " in str(error.value)


def test_cut_off_anywhere(path, tmp_path):
    data = path.read_bytes()
    refused(tmp_path, b"", "it is empty")
    for end in range(1, len(data) - 1, 97):
        refused(tmp_path, data[:end], "begin with GGUF|is cut off|the tensor '.*' of .* lies in the bytes")
    refused(tmp_path, data[:-64], "the tensor 'blk.0.ffn_up.weight' of Q4_0 .* lies in the bytes")


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_bytes_in_the_header(path, tmp_path_factory, data):
    bytes_ = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 900))
        bytes_[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, b"\0" * 8]) | st.binary(max_size=8))
    damaged = tmp_path_factory.getbasetemp() / "damaged.gguf"
    damaged.write_bytes(bytes_)
    try:
        found = open_gguf(damaged)
        for tensor in found.tensors.values():
            tensor.read()
    except wf.CheckpointError:
        pass


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def pair(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def tensor(name, *sizes, kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(pairs=(), tensors=(), version=3, counts=None):
    pairs = [pair("general.architecture", 8, string("llama")), *pairs]
    counts = counts or (len(tensors), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join([*pairs, *tensors])


HUGE = 1 << 62
BAD = {
    "does not begin with GGUF": b"GGML" + bytes(100),
    "version 1 is none of": header(version=1),
    r"version 50331648 \(bytes are in the order of other machines\)": header(version=3 << 24),
    "it has 4611686018427387904 tensors": header(counts=(HUGE, 1)),
    "is cut off": header(counts=(0, HUGE)),
    "general.architecture' twice": header([pair("general.architecture", 8, string("llama"))]),
    "'k' is of the unknown type 99": header([pair("k", 99, b"")]),
    "'k' is an array of arrays": header([pair("k", 9, struct.pack("<IQ", 9, 1))]),
    "not UTF-8": header([pair("k", 8, struct.pack("<Q", 1) + b"\xff")]),
    "general.alignment = 0": header([pair("general.alignment", 4, struct.pack("<I", 0))]),
    "general.alignment = 12": header([pair("general.alignment", 4, struct.pack("<I", 12))]),
    "general.alignment = 'x'": header([pair("general.alignment", 8, string("x"))]),
    "it is one of 3 files, and not named": header([pair("split.count", 2, struct.pack("<H", 3))]),
    "'w' has 0 dimensions": header(tensors=[tensor("w")]) + bytes(99),
    "'w' has 9 dimensions": header(tensors=[tensor("w", *[1] * 9)]) + bytes(99),
    r"'w' of F32 has the shape \[3, 0\]": header(tensors=[tensor("w", 0, 3)]) + bytes(99),
    r"'w' of Q8_0 has the shape \[2, 31\]": header(tensors=[tensor("w", 31, 2, kind=8)]) + bytes(99),
    "'w' is of the unknown type 77": header(tensors=[tensor("w", 1, kind=77)]) + bytes(99),
    r"'w' of F32 \[4611686018427387904, 4\] lies in": header(tensors=[tensor("w", 4, HUGE)]) + bytes(99),
    "'w' of F32 .* lies in the bytes 4611686018427388": header(tensors=[tensor("w", 4, offset=HUGE)]),
    "'w' of F32 .* lies in": header(tensors=[tensor("w", 1, offset=4)]) + bytes(99),
    "the tensor 'w' twice": header(tensors=[tensor("w", 1), tensor("w", 1)]) + bytes(99),
    **{f"(?#{kind})is cut off": header([pair("k", 9, struct.pack("<IQ", kind, HUGE))]) for kind in range(9)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_headers(tmp_path, message):
    refused(tmp_path, BAD[message], message)


def test_a_header_has_a_largest_size(path):
    with mock.patch.object(_header, "LARGEST", 100), pytest.raises(wf.CheckpointError, match="is cut off"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention.head_count": 3}, r"'blk\.0\.attn_q\.weight' of \[32, 64\] is not of 3 heads"),
        ({"attention.head_count": "4"}, "is not of '4' heads"),
        ({"attention.head_count": [4]}, r"is not of \[4\] heads"),
        ({"rope.scaling.type": "new"}, r"rope\.scaling\.type = 'new'"),
    ],
)
def test_bad_fields(tmp_path, change, message):
    weight = np.ones((32, 64), np.float32)
    write(tmp_path / "bad.gguf", {"blk.0.attn_q.weight": weight}, fields=LLAMA | change)
    with pytest.raises(wf.CheckpointError, match=message):
        open_gguf(tmp_path / "bad.gguf")


def test_unknown_architecture(tmp_path):
    with pytest.raises(wf.CheckpointError, match=r"general\.architecture = 'mamba' is none of \['llama'"):
        open_gguf(write(tmp_path / "mamba.gguf", {}, "mamba", {}))
