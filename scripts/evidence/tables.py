"""The results in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from restoration.tables import interval, markdown, number

SHOWS = "shows"
LESS_IS_BETTER = ("outliers_left", "max_over_median", "attention_on_outliers", "sink", "hottest", "rmse", "abs_rel")
LESS_IS_BETTER_OF = ("distance_", "pixels_", "attack_success")
NOT_RUN = "-"


def of_columns(made: dict[str, Any]) -> str:
    """What each column is."""
    rows = [["column", "what", "neurons", "registers"], ["plain", made["note"], "0", "0"]]
    for name, facts in made["columns"].items():
        count = sum(map(len, facts.get("neurons", {}).values()))
        what = facts["what"].replace("|", "\\|")  # which ends a cell
        rows.append([name, what, str(count), str(facts.get("num_registers", 0))])
    return markdown(rows)


def of_shows(made: dict[str, Any]) -> str:
    """What is shown of outliers, and how far outputs are from the plain network's: a line for each column."""
    result = made["tasks"][SHOWS]
    names = _columns(made)
    metrics = list(result["metrics"]["plain"])
    rows = [
        [name, *(number(result["metrics"][name][metric], 3) for metric in metrics)]
        for name in names
        if name in result["metrics"]
    ]
    return _headed(made, markdown([["column", *(f"`{metric}`" for metric in metrics)], *rows]))


def of_values(made: dict[str, Any]) -> str:
    """The metrics of all tasks, a line each: bold where the interval of the difference from plain lies on the better
    side of 0, in italics where it lies on the worse side."""
    names = _columns(made)
    rows = [["task", "metric", *names]]
    for task, result, metric in _metrics(made):
        values = []
        for name in names:
            value = result["metrics"].get(name, {}).get(metric, NOT_RUN)
            shown = value if value == NOT_RUN else number(value, 3)
            mark = _mark(metric, result["difference"].get(name, {}).get(metric))
            values.append(f"{mark}{shown}{mark}")
        rows.append([task, f"`{metric}`", *values])
        if metric == "corloc" and task.endswith("-k"):
            rows += [
                [task, f"`{name}`, no model", number(value, 3)] + [""] * (len(names) - 1)
                for name, value in result["baselines"].items()
            ]
    return _headed(made, markdown(rows))


def of_intervals(made: dict[str, Any]) -> str:
    """How far each column is from plain, with its interval, in all metrics."""
    done = {name for result in made["tasks"].values() for name in result["difference"]}
    names = [name for name in _columns(made) if name in done]
    rows = [["task", "metric", *names]]
    for task, result, metric in _metrics(made, with_shows=True):
        found = [result["difference"].get(name, {}).get(metric) for name in names]
        rows.append([task, f"`{metric}`", *(NOT_RUN if each is None else interval(each, 3) for each in found)])
    return _headed(made, markdown(rows))


def of_times(made: dict[str, Any]) -> str:
    """What each task was done with, for which columns, and how long that took."""
    rows = [["task", "protocol", "columns", "CPU minutes"]]
    for task, result in made["tasks"].items():
        said = ", ".join(f"{key} {value}" for key, value in result["protocol"].items() if value is not None)
        seconds = result["cpu_seconds"]
        rows.append([task, said, ", ".join(seconds), f"{sum(seconds.values()) / 60:.1f}"])
    total = sum(sum(result["cpu_seconds"].values()) for result in made["tasks"].values())
    return markdown([*rows, ["all", "", "", f"{total / 60:.1f}"]])


def _headed(made: dict[str, Any], table: str) -> str:
    return f"**{made['note']}**\n\n{table}"


def _columns(made: dict[str, Any]) -> list[str]:
    return ["plain", *made["columns"]]


def _metrics(made: dict[str, Any], *, with_shows: bool = False) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each task, its result, and the name of each of its metrics, once: LOST's hits are the same for q, k and v."""
    for task, result in made["tasks"].items():
        if task == SHOWS and not with_shows:
            continue
        for metric in result["metrics"]["plain"]:
            if metric != "hit_ratio" or task.endswith("-k"):
                yield task, result, metric


def _mark(metric: str, difference: list[float | None] | None) -> str:
    if difference is None or None in difference:
        return ""
    _, low, high = difference
    less = metric in LESS_IS_BETTER or metric.startswith(LESS_IS_BETTER_OF)
    better, worse = (high < 0, low > 0) if less else (low > 0, high < 0)
    return "**" if better else "*" if worse else ""
