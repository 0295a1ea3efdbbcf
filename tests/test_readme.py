"""Every figure of the README's table was written by `warpformer bench --json`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| (\w+) (.+), (\w+) \| (\d+) % (\w+) \| ([\d.]+)x (\S[\w. ]*) \|$", re.M)


def test_the_table_is_that_of_the_results():
    results = json.loads((ROOT / re.search(r"\]\((bench/results/\S+\.json)\)", README)[1]).read_text())
    rows = {(row["op"], row["case"], row["dtype"]): row for row in results["rows"]}
    table = ROW.findall(README)
    assert len(table) >= 8
    for op, case, dtype, share, limit, speed, peer in table:
        row = rows[op, case, dtype]
        assert (limit, f"{row['share']:.0%}") == (row["limit"], f"{share}%"), (op, case, dtype)
        assert f"{row['peers'][peer]:.2f}" == speed, (op, case, dtype)
