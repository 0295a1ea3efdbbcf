import pytest

from warpformer import InputError
from warpformer.training import read_texts


def write(tmp_path, data):
    path = tmp_path / "texts"
    path.write_bytes(data)
    return path


def test_lines(tmp_path):
    texts = read_texts(write(tmp_path, b"\xef\xbb\xbfone\n  two \r\n\n \nthree\n\n"))
    assert texts.rows == [("one",), ("two",), ("three",)]
    assert texts.documents == [range(2), range(2, 3)]
    assert texts.skipped == {}
    assert texts.report() == ""


def test_what_is_skipped_of_lines(tmp_path):
    texts = read_texts(write(tmp_path, b"one\n\xff\xfe\ntwo\n" + b"x" * 11 + b"\nthree"), max_bytes=10)
    assert texts.column() == ["one", "two", "three"]
    assert texts.documents == [range(3)]  # what is skipped ends no document
    assert texts.skipped == {"invalid UTF-8": 1, "too long": 1}


def test_columns(tmp_path):
    texts = read_texts(write(tmp_path, "a\tb\tc\nd\te é\tf \n".encode()), [2, 1])
    assert texts.rows == [("c", "b"), ("f", "e é")]
    assert texts.documents == [range(2)]


def test_what_is_skipped_of_columns(tmp_path):
    lines = ["a\tb", "a", "", "a\t ", "c\td", *["x"] * 6]
    path = write(tmp_path, "\n".join(lines).encode() + b"\ne\t\xff\n")
    texts = read_texts(path, [0, 1])
    assert texts.rows == [("a", "b"), ("c", "d")]
    assert texts.skipped == {"missing column": 7, "empty line": 1, "empty column": 1, "invalid UTF-8": 1}
    assert texts.report().splitlines() == [
        f"{path}: skipped 7 lines: missing column (line 2, 6, 7, 8, 9, ...)",
        f"{path}: skipped 1 lines: empty line (line 3)",
        f"{path}: skipped 1 lines: empty column (line 4)",
        f"{path}: skipped 1 lines: invalid UTF-8 (line 12)",
    ]


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "none")
    with pytest.raises(InputError, match="it is empty"):
        read_texts(write(tmp_path, b""))
    with pytest.raises(InputError, match="missing column"):
        read_texts(write(tmp_path, b"a\nb\n"), [1])
    with pytest.raises(InputError, match="columns"):
        read_texts(write(tmp_path, b"a\n"), [-1])
