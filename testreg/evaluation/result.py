"""The result of an evaluation: its JSON, its table and its pictures."""

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
    """The metrics of one task: of the plain model, of the patched one, and of another model that it is held against."""

    task: str
    model: str
    data: str
    protocol: Mapping[str, Any]
    """How the figures were made, as far as the model does not say it."""
    metrics: Mapping[str, Mapping[str, float]]
    """Of each column, "plain", "patched" and "against", as far as it was asked for, {metric: value}."""
    difference: Mapping[str, Difference] | None
    """Patched less plain: value and bounds of the 95 % interval; None without a patched column."""
    difference_against: Mapping[str, Difference] | None = None
    """The other model less plain; None without another model."""
    baselines: Mapping[str, float] = field(default_factory=dict)
    """Metrics of what needs no model."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What a task says beyond its metrics, fit for JSON."""
    notes: Sequence[str] = ()
    """What a reader of the table should know, in sentences that stand below it."""
    pictures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict, compare=False)
    """Makes each picture of the task, by name."""

    def to_json(self) -> dict[str, Any]:
        """The result as JSON has it; metrics that are not defined (NaN) are null."""
        columns = {name: self.metrics.get(name) for name in COLUMNS}
        data = {"format": FORMAT, "version": VERSION, "task": self.task, "model": self.model, "data": self.data}
        data |= {"protocol": dict(self.protocol), **columns, "difference": self.difference}
        data |= {"difference_against": self.difference_against, "baselines": self.baselines, "details": self.details}
        return _finite(data)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def save_figures(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the task's pictures into a folder, as PNG; returns their paths."""
        written = []
        for name, make in self.pictures.items():
            path = Path(folder) / f"{self.task}-{name}.png"
            with replacing(path) as temporary:
                make().savefig(temporary, format="png", dpi=150)
            written.append(path)
        return written

    def table(self) -> Table:
        """The metrics as a table of rich, a row for each."""
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
    value, low, high = difference
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def _finite(value: Any) -> Any:
    """`value` as JSON takes it: mappings as dicts, tuples as lists, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
