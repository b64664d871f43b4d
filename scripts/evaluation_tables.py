"""Write the tables in the docs from the JSON results in docs/evaluations: `python scripts/evaluation_tables.py`.

A table is between `<!-- table NAME -->` or `<!-- table NAME PART -->` and `<!-- end -->`. It is made from
docs/evaluations/NAME.json, which one of these has written:

- `testreg evaluate --json`, without parts;
- `scripts/restoration`, with the parts ways, tasks and samples;
- `scripts/harmless.py`, with the parts both and samples;
- `scripts/evidence`, with the parts columns, shows, values, intervals and times;
- `scripts/quantisation`, with the parts places, own, nearness, gaps, neighbours and real.

If the file does not exist, the table in the docs is kept.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from evidence import tables as evidence
from quantisation import tables as quantisation
from restoration import tables
from restoration.tables import interval, markdown, number

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("evaluate.md", "evidence.md", "proof.md", "quantisation.md")
COLUMNS = ("plain", "patched", "against")
PARTS = {  # {part: function that makes its table from the JSON}
    "ways": tables.of_ways,
    "tasks": tables.of_tasks,
    "both": tables.of_plain_and_patched,
    "samples": tables.of_samples,
    "columns": evidence.of_columns,
    "shows": evidence.of_shows,
    "values": evidence.of_values,
    "intervals": evidence.of_intervals,
    "times": evidence.of_times,
    "places": quantisation.of_places,
    "own": quantisation.of_own,
    "nearness": quantisation.of_nearness,
    "gaps": quantisation.of_gaps,
    "neighbours": quantisation.of_knn,
    "real": quantisation.of_real,
}


def table_of(result: dict[str, Any]) -> str:
    """The table of a result of `testreg evaluate`, in Markdown."""
    columns = [name for name in COLUMNS if result[name] is not None]
    head = ["metric", *columns, *(["patched - plain, 95 % interval"] if result["difference"] else [])]
    rows = [head]
    for metric in result["plain"]:
        row = [f"`{metric}`", *(number(result[name][metric]) for name in columns)]
        rows.append([*row, interval(result["difference"][metric])] if result["difference"] else row)
    rows += [
        [f"`{name}`, no model", number(value)] + [""] * (len(head) - 2) for name, value in result["baselines"].items()
    ]
    return markdown(rows)


def with_new_tables(page: str) -> str:
    """The text of a page with all its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name, part = match[1], match[2]
        file = DOCS / "evaluations" / f"{name}.json"
        if not file.is_file():
            return match[0]
        result = json.loads(file.read_text(encoding="utf-8"))
        markdown_table = PARTS[part.strip()](result) if part else table_of(result)
        return f"<!-- table {name}{part or ''} -->\n\n{markdown_table}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+)( \w+)? -->.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for file in (DOCS / name for name in PAGES):
        file.write_text(with_new_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
