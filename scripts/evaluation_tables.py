"""Write the tables of docs/evaluate.md from the results in docs/evaluations: `python scripts/evaluation_tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`, and is that of docs/evaluations/NAME.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
COLUMNS = ("plain", "patched", "against")


def table_of(result: dict[str, Any]) -> str:
    """The metrics of a result as a table of Markdown."""
    columns = [name for name in COLUMNS if result[name] is not None]
    head = ["metric", *columns, *(["patched - plain, 95 % interval"] if result["difference"] else [])]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for metric in result["plain"]:
        row = [f"`{metric}`", *(_number(result[name][metric]) for name in columns)]
        if result["difference"]:
            value, low, high = result["difference"][metric]
            row.append("" if low is None else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]")
        rows.append(row)
    rows += [
        [f"`{name}`, no model", _number(value)] + [""] * (len(head) - 2) for name, value in result["baselines"].items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


def updated(page: str) -> str:
    """The page with all its tables as the results have them."""

    def table(found: re.Match[str]) -> str:
        result = json.loads((DOCS / "evaluations" / f"{found[1]}.json").read_text(encoding="utf-8"))
        return f"<!-- table {found[1]} -->\n\n{table_of(result)}\n\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


if __name__ == "__main__":
    page = DOCS / "evaluate.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
