"""Makes tables of the results in Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from restoration.tables import interval, markdown, number

SHOWS = "shows"
LESS_IS_BETTER = ("outliers_left", "max_over_median", "attention_on_outliers", "sink", "hottest", "rmse", "abs_rel")
LESS_IS_BETTER_OF = ("distance_", "pixels_", "attack_success")  # how names of further such metrics begin
NOT_RUN = "-"


def of_columns(results: dict[str, Any]) -> str:
    """A table that says what each column is."""
    rows = [["column", "what", "neurons", "registers"], ["plain", results["note"], "0", "0"]]
    for name, facts in results["columns"].items():
        count = sum(map(len, facts.get("neurons", {}).values()))
        what = facts["what"].replace("|", "\\|")  # a bare | would end the cell
        rows.append([name, what, str(count), str(facts.get("num_registers", 0))])
    return markdown(rows)


def of_shows(results: dict[str, Any]) -> str:
    """The metrics of the row `shows`, with a line for each column."""
    result = results["tasks"][SHOWS]
    names = _columns(results)
    metrics = list(result["metrics"]["plain"])
    rows = [
        [name, *(number(result["metrics"][name][metric], 3) for metric in metrics)]
        for name in names
        if name in result["metrics"]
    ]
    return _with_note(results, markdown([["column", *(f"`{metric}`" for metric in metrics)], *rows]))


def of_values(results: dict[str, Any]) -> str:
    """The metrics of all tasks, with a line for each metric.

    A value is bold if the interval of its difference from the plain network is wholly on the better side of 0, and in
    italics if it is wholly on the worse side.
    """
    names = _columns(results)
    rows = [["task", "metric", *names]]
    for task, result, metric in _metrics(results):
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
    return _with_note(results, markdown(rows))


def of_intervals(results: dict[str, Any]) -> str:
    """The difference of each column from the plain network, with its interval, for all metrics."""
    done = {name for result in results["tasks"].values() for name in result["difference"]}
    names = [name for name in _columns(results) if name in done]
    rows = [["task", "metric", *names]]
    for task, result, metric in _metrics(results, with_shows=True):
        found = [result["difference"].get(name, {}).get(metric) for name in names]
        rows.append([task, f"`{metric}`", *(NOT_RUN if each is None else interval(each, 3) for each in found)])
    return _with_note(results, markdown(rows))


def of_times(results: dict[str, Any]) -> str:
    """The protocol of each task, the columns that it was computed for, and the CPU time."""
    rows = [["task", "protocol", "columns", "CPU minutes"]]
    for task, result in results["tasks"].items():
        protocol_in_words = ", ".join(
            f"{key} {value}" for key, value in result["protocol"].items() if value is not None
        )
        seconds = result["cpu_seconds"]
        rows.append([task, protocol_in_words, ", ".join(seconds), f"{sum(seconds.values()) / 60:.1f}"])
    total = sum(sum(result["cpu_seconds"].values()) for result in results["tasks"].values())
    return markdown([*rows, ["all", "", "", f"{total / 60:.1f}"]])


def _with_note(results: dict[str, Any], table: str) -> str:
    """The table below the note that says which weights were measured."""
    return f"**{results['note']}**\n\n{table}"


def _columns(results: dict[str, Any]) -> list[str]:
    """The names of all columns."""
    return ["plain", *results["columns"]]


def _metrics(results: dict[str, Any], *, with_shows: bool = False) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (task, its result, name of a metric). LOST's hit ratio, the same for q, k and v, comes only once."""
    for task, result in results["tasks"].items():
        if task == SHOWS and not with_shows:
            continue
        for metric in result["metrics"]["plain"]:
            if metric != "hit_ratio" or task.endswith("-k"):
                yield task, result, metric


def _mark(metric: str, difference: list[float | None] | None) -> str:
    """Markdown's mark for bold if the difference is certainly better, for italics if it is certainly worse, else ""."""
    if difference is None or None in difference:
        return ""
    _, low, high = difference
    less = metric in LESS_IS_BETTER or metric.startswith(LESS_IS_BETTER_OF)
    better, worse = (high < 0, low > 0) if less else (low > 0, high < 0)
    return "**" if better else "*" if worse else ""
