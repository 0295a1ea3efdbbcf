"""Every figure of the tables of results was written by `warpformer bench --json`."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\w+) (.+), (\w+) \| (\d+) % (\w+) \| ([\d.]+)x (\S[\w. ]*) \|$", re.M)


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_the_table_is_that_of_the_results(page):
    text = (ROOT / page).read_text()
    results = json.loads((ROOT / re.search(r"\b(bench/results/\S+\.json)\b", text)[1]).read_text())
    rows = {(row["op"], row["case"], row["dtype"]): row for row in results["rows"]}
    table = ROW.findall(text)
    assert len(table) >= 8
    for op, case, dtype, share, limit, speed, peer in table:
        row = rows[op, case, dtype]
        assert (limit, f"{row['share']:.0%}") == (row["limit"], f"{share}%"), (op, case, dtype)
        assert f"{row['peers'][peer]:.2f}" == speed, (op, case, dtype)
