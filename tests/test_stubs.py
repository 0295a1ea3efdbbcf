"""_C.pyi is what pybind11-stubgen makes of the built module: `python -m tests.test_stubs` writes it."""

import re
import subprocess
import sys
from pathlib import Path

STUBS = Path(__file__).parents[1] / "python/warpformer/_C.pyi"
HEADER = "# Written by `python -m tests.test_stubs`.\n"


def generate(folder):
    run("pybind11_stubgen", "warpformer._C", "--output-dir", folder)
    text = (Path(folder) / "warpformer/_C.pyi").read_text()
    # Without values, which differ from build to build.
    text = re.sub(r"^(\w+): str = .*$", r"\1: str", text, flags=re.MULTILINE)
    # pybind11 takes the class for one of the package, which imports it from here.
    text = text.replace("from warpformer import InputError\n", "")
    text += "class InputError(ValueError, RuntimeError): ...\n"
    text = re.sub(r"typing\.Supports(Int|Float) \| typing\.SupportsIndex", lambda m: m[1].lower(), text)
    text = text if "typing." in text else text.replace("import typing\n", "")
    text = run(
        "ruff", "check", "--quiet", "--select", "I", "--fix", "--stdin-filename", STUBS, "-", stdin=text
    )
    return HEADER + run("ruff", "format", "--stdin-filename", STUBS, "-", stdin=text)


def run(module, *arguments, stdin=""):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, input=stdin).stdout


def test_stubs_match_the_module(tmp_path):
    assert STUBS.read_text() == generate(tmp_path), "a binding changed: make stubs"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        STUBS.write_text(generate(folder))
