"""Write the tables of the docs from the results beside them: `python scripts/evaluation_tables.py`.

A table stands between `<!-- table NAME -->`, or `<!-- table NAME part -->`, and `<!-- end -->`, and is that of
docs/evaluations/NAME.json: what `testreg evaluate --json` wrote; or `scripts/restoration`, whose parts are ways, tasks
and samples; or `scripts/harmless.py`, whose parts are both and samples; or `scripts/evidence`, whose parts are columns,
shows, values, intervals and times; or `scripts/quantisation`, whose parts are places,
own, nearness, gaps, neighbours and real. Where there is no such file yet, what stands there stays.
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
PARTS = {
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
    """The metrics of a result of `testreg evaluate`."""
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


def updated(page: str) -> str:
    """The page with all its tables as the results have them."""

    def table(found: re.Match[str]) -> str:
        name, part = found[1], found[2]
        file = DOCS / "evaluations" / f"{name}.json"
        if not file.is_file():
            return found[0]
        result = json.loads(file.read_text(encoding="utf-8"))
        made = PARTS[part.strip()](result) if part else table_of(result)
        return f"<!-- table {name}{part or ''} -->\n\n{made}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+)( \w+)? -->.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    for file in (DOCS / name for name in PAGES):
        file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
