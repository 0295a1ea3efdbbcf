"""What a GPU gave for every case: golden.json. Equal bits as a hash, everything else as values."""

import base64
import hashlib
import json
from pathlib import Path

import numpy as np

from tests.conformance.case import Case

PATH = Path(__file__).with_name("golden.json")


def digest(result: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(result).tobytes(), digest_size=8).hexdigest()


def record(gpu: str, results: list[tuple[Case, np.ndarray]], path: Path = PATH) -> None:
    exact = {case.name: digest(result) for case, result in results if case.bound is None}
    values = {
        case.name: base64.b64encode(np.ascontiguousarray(result).tobytes()).decode()
        for case, result in results
        if case.bound is not None
    }
    path.write_text(json.dumps({"gpu": gpu, "exact": exact, "values": values}, indent=1) + "\n")


class Golden:
    def __init__(self, path: Path = PATH):
        content = json.loads(path.read_text())
        self.gpu, self._exact, self._values = content["gpu"], content["exact"], content["values"]

    def names(self) -> set[str]:
        return {*self._exact, *self._values}

    def check(self, case: Case, got: np.ndarray) -> None:
        """AssertionError where `got` is not what the GPU gave, or too far from it."""
        if case.bound is None:
            assert digest(got) == self._exact[case.name], f"{case.name}: other bits than on {self.gpu}"
        else:
            raw = base64.b64decode(self._values[case.name])
            case.check(got, np.frombuffer(raw, got.dtype).reshape(got.shape), times=2)
