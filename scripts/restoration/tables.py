"""Writes the results as JSON, and makes tables of them in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testreg.files import replacing

WAYS_SHOWN = ("untouched", "planted", "testreg", "paper", "zeroing", "random")
LEFT_OUT = ("outliers",)  # no column of the table, since its heading says it


def write(file: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON. An existing file is replaced only once the new one is complete."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def of_ways(results: dict[str, Any]) -> str:
    """A table of how near each way comes to the untouched network."""
    ways = results["ways"]
    names = [name for name in ways["nothing moved"] if name not in LEFT_OUT]
    rows = [[way, *(number(row[name], 3) for name in names)] for way, row in ways.items()]
    share = ways["nothing moved"]["outliers"]
    return (
        f"**{results['mechanism']}, seed {results['seed']}: planted, {share:.1%} of the patches are outliers**\n\n"
        + markdown([["way", *names], *rows])
    )


def of_tasks(results: dict[str, Any]) -> str:
    """A table of the metrics of all tasks for each way, with the difference of testreg from the planted network."""
    rows = [["task", "metric", *WAYS_SHOWN, "testreg - planted, 95 % interval"]]
    for task, result in results["tasks"].items():
        for metric in result["metrics"]["planted"]:
            values = [number(result["metrics"][way][metric]) for way in WAYS_SHOWN]
            rows.append([task, f"`{metric}`", *values, interval(result["difference"]["testreg"][metric])])
    return markdown(rows)


def of_plain_and_patched(results: dict[str, Any]) -> str:
    """A table of the metrics of all tasks of `scripts/harmless.py`, plain and patched."""
    rows = [["task", "metric", "plain", "patched", "patched - plain, 95 % interval"]]
    for task, result in results["tasks"].items():
        for metric, plain in result["plain"].items():
            values = [number(plain), number(result["patched"][metric])]
            rows.append([task, f"`{metric}`", *values, interval(result["difference"][metric])])
    return markdown(rows)


def of_samples(results: dict[str, Any]) -> str:
    """A table of each task's protocol and CPU time."""
    rows = [["task", "protocol", "CPU minutes"]]
    for task, result in results["tasks"].items():
        protocol = {key: value for key, value in result["protocol"].items() if key not in ("neurons", "against")}
        protocol_in_words = ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None)
        rows.append([task, protocol_in_words, f"{result['cpu_seconds'] / 60:.1f}"])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, from its rows, of which the first is the header."""
    head, *body = rows
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def interval(difference: Sequence[float | None], digits: int = 4) -> str:
    """A difference with the bounds of its interval, as text; "" if it is not defined."""
    value, low, high = difference
    if value is None or low is None:
        return ""
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def number(value: float | None, digits: int = 4) -> str:
    """A value as text."""
    if value is None:
        return "not defined"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"
