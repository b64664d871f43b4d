"""The results, as JSON and in Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testreg.files import replacing

SHOWN = ("untouched", "planted", "testreg", "paper", "zeroing", "random")
HIDDEN = ("outliers",)  # which the heading says


def write(file: Path, made: dict[str, Any]) -> None:
    """Write the results as JSON; an existing file is replaced whole or not at all."""
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def of_ways(made: dict[str, Any]) -> str:
    """How near each way comes to the untouched network."""
    ways = made["ways"]
    names = [name for name in ways["nothing moved"] if name not in HIDDEN]
    rows = [[way, *(number(row[name], 3) for name in names)] for way, row in ways.items()]
    share = ways["nothing moved"]["outliers"]
    return (
        f"**{made['mechanism']}, seed {made['seed']}: planted, {share:.1%} of the patches are outliers**\n\n"
        + markdown([["way", *names], *rows])
    )


def of_tasks(made: dict[str, Any]) -> str:
    """The metrics of all tasks by way, and how testreg differs from the planted network."""
    rows = [["task", "metric", *SHOWN, "testreg - planted, 95 % interval"]]
    for task, result in made["tasks"].items():
        for metric in result["metrics"]["planted"]:
            values = [number(result["metrics"][way][metric]) for way in SHOWN]
            rows.append([task, f"`{metric}`", *values, interval(result["difference"]["testreg"][metric])])
    return markdown(rows)


def of_plain_and_patched(made: dict[str, Any]) -> str:
    """The metrics of all tasks of `scripts/harmless.py`, plain and patched."""
    rows = [["task", "metric", "plain", "patched", "patched - plain, 95 % interval"]]
    for task, result in made["tasks"].items():
        for metric, plain in result["plain"].items():
            values = [number(plain), number(result["patched"][metric])]
            rows.append([task, f"`{metric}`", *values, interval(result["difference"][metric])])
    return markdown(rows)


def of_samples(made: dict[str, Any]) -> str:
    """What each task was done with, and how long it took."""
    rows = [["task", "protocol", "CPU minutes"]]
    for task, result in made["tasks"].items():
        protocol = {key: value for key, value in result["protocol"].items() if key not in ("neurons", "against")}
        said = ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None)
        rows.append([task, said, f"{result['cpu_seconds'] / 60:.1f}"])
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; its first row is the head."""
    head, *body = rows
    ruled = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def interval(difference: Sequence[float | None], digits: int = 4) -> str:
    """A difference with its bounds."""
    value, low, high = difference
    if value is None or low is None:
        return ""
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def number(value: float | None, digits: int = 4) -> str:
    """A value as tables show it."""
    if value is None:
        return "not defined"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"
