"""Formats values for people to read: numbers, shares, lists and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table of text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def table_of(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table whose cells are formatted by `value_of`."""
    return Table(header, [list(map(value_of, row)) for row in rows])


def words_of(key: str) -> str:
    """A key of a JSON as words."""
    return key.replace("_", " ")


def value_of(value: object) -> str:
    """A value of a JSON as text: "-" for None and NaN, "yes" and "no", four digits of a float, and 224 x 224 for two
    whole numbers, which are taken for a size."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, list | tuple):
        is_size = len(value) == 2 and all(isinstance(each, int) for each in value)
        return (" x " if is_size else ", ").join(map(value_of, value))
    return str(value)


def percent(value: float) -> str:
    """A percentage as text, with a space before % at which lines do not break."""
    return f"{value:.{2 if value < 1 else 3}g}\N{NO-BREAK SPACE}%"


def share(value: float) -> str:
    """A share (0 to 1) as a percentage; very small shares are "< 0.01 %"."""
    return f"< {percent(0.01)}" if 0 < value < 1e-4 else percent(100 * value)
