"""The result of an evaluation: its metrics, JSON, table and pictures.

A result has up to three columns: "plain" (the model without registers), "patched" (the same model with registers), and
"against" (another model, e.g. one with trained registers).
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testreg.evaluation.bootstrap import Difference
from testreg.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

FORMAT = "testreg-evaluation"
VERSION = 1
COLUMNS = ("plain", "patched", "against")


@dataclass(frozen=True)
class Result:
    """The metrics that one task measured, for the plain model, the patched model, and another model."""

    task: str
    model: str
    data: str
    protocol: Mapping[str, Any]
    """How the metrics were measured: number of images, image size, neurons, seed, and other arguments of the task."""
    metrics: Mapping[str, Mapping[str, float]]
    """{column: {metric: value}}; columns that were not asked for are missing."""
    difference: Mapping[str, Difference] | None
    """{metric: patched minus plain, with the bounds of its 95 % interval}; None without a patched column."""
    difference_against: Mapping[str, Difference] | None = None
    """The same for the other model minus plain; None without another model."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """{metric: value} of trivial answers that need no model, e.g. a box around the whole image."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further figures of the task, as JSON can hold them."""
    notes: Sequence[str] = ()
    """Sentences that are printed below the table."""
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict, compare=False)
    """The task's pictures: {name: function that draws it}."""

    def to_json(self) -> dict[str, Any]:
        """The result as a dictionary for JSON, in which metrics that are not defined (NaN) are None."""
        columns = {name: self.metrics.get(name) for name in COLUMNS}
        data = {"format": FORMAT, "version": VERSION, "task": self.task, "model": self.model, "data": self.data}
        data |= {"protocol": dict(self.protocol), **columns, "difference": self.difference}
        data |= {"difference_against": self.difference_against, "baselines": self.baselines, "details": self.details}
        return _finite(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON. An existing file is replaced only once the new one is complete."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def save_figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Draw the task's pictures and write them into a folder as PNG files. Returns the paths."""
        written = []
        for name, make in self.pictures.items():
            path = Path(folder) / f"{self.task}-{name}.png"
            with replacing(path) as temporary:
                make().savefig(temporary, format="png", dpi=150)
            written.append(path)
        return written

    def table(self) -> Table:
        """The metrics as a table of the library rich: one row for each metric, one column for each model."""
        from rich.table import Table

        table = Table(title=self.task)
        table.add_column("metric")
        for name in self.metrics:
            table.add_column(name, justify="right")
        differences = {"patched - plain": self.difference, "against - plain": self.difference_against}
        shown = {name: values for name, values in differences.items() if values is not None}
        for name in shown:
            table.add_column(f"{name} (95 %)", justify="right")
        for metric in self.metrics["plain"]:
            values = [f"{column[metric]:.4f}" for column in self.metrics.values()]
            table.add_row(metric, *values, *(_interval(each[metric]) for each in shown.values()))
        table.add_section()
        for name, value in self.baselines.items():
            table.add_row(f"{name} (no model)", f"{value:.4f}")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120)
        with console.capture() as captured:
            console.print(self.table())
        return captured.get() + "".join(f"{note}\n" for note in self.notes)


def _interval(difference: Difference) -> str:
    """A difference with its interval, as text."""
    value, low, high = difference
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _finite(value: Any) -> Any:
    """`value` with mappings as dicts, tuples as lists, and NaN and infinities as None, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
