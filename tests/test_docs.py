"""The site: every public name has its place, and what a page tells its reader to type runs."""

import inspect
import re
from pathlib import Path

import pytest

import warpformer as wf
from warpformer.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SAMPLE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
SAMPLES = {page: SAMPLE.findall(page.read_text()) for page in PAGES}


def public_names():
    """Of each object the shortest name."""
    names = {}
    for path, module in {"": wf, "nn.": wf.nn, "ops.": wf.ops, "quantization.": wf.quantization}.items():
        for name in module.__all__:
            value = getattr(module, name)
            if name != "__version__" and not inspect.ismodule(value):
                names.setdefault(value, path + name)
    return set(names.values())


def test_every_public_name_is_on_one_page():
    found = [name for page in PAGES for name in re.findall(r"^::: warpformer\.(\S+)", page.read_text(), re.M)]
    assert sorted(public_names() - set(found)) == []
    assert sorted({name for name in found if found.count(name) > 1}) == []


def test_every_layer_has_a_sample():
    pages = {page: re.findall(r"^::: warpformer\.nn\.(\S+)", page.read_text(), re.M) for page in PAGES}
    assert {page.name: names for page, names in pages.items() if names and not SAMPLES[page]} == {}


@pytest.mark.parametrize(
    "page",
    [page for page, samples in SAMPLES.items() if samples],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_samples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where they save to
    names = {}
    for sample in SAMPLES[page]:
        exec(compile(sample, str(page), "exec"), names)


def test_every_command_is_on_its_page():
    text = (ROOT / "docs/command_line.md").read_text()
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    assert [name for name in commands if f"    warpformer {name}" not in text] == []
