"""Every figure of the README's table was written by `warpformer bench --json`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROW = re.compile(r"\| (\w+) (.+), (\w+) \| (\d+) % (\w+) \|(?: ([\d.]+)x (\S[\w. ]*))? \|")


def test_the_table_is_that_of_the_results():
    results = json.loads((ROOT / re.search(r"\]\((bench/results/\S+\.json)\)", README)[1]).read_text())
    rows = {(row["op"], row["case"], row["dtype"]): row for row in results["rows"]}
    text = README.partition("[start:results]")[2].partition("[end:results]")[0]
    table = re.findall(r"^\|.*", text, re.M)[2:]
    assert len(table) >= 8
    for line in table:
        op, case, dtype, share, limit, speed, peer = ROW.fullmatch(line).groups()
        row = rows[op, case, dtype]
        assert (limit, f"{row['share']:.0%}") == (row["limit"], f"{share}%"), line
        assert speed == (f"{row['peers'][peer]:.2f}" if row["peers"] else None), line
