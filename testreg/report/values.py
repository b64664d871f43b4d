"""What a person reads: numbers, words and tables, of anything that JSON holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def table_of(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    return Table(heads, [list(map(value_of, row)) for row in rows])


def words_of(key: str) -> str:
    return key.replace("_", " ")


def value_of(value: object) -> str:
    """Anything that JSON holds, as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        is_size = len(value) == 2 and all(isinstance(each, int) for each in value)
        return (" x " if is_size else ", ").join(map(value_of, value))
    return str(value)


def percent(value: float) -> str:
    """A percentage, of which a line break does not part the number from its sign."""
    return f"{value:.{2 if value < 1 else 3}g}\N{NO-BREAK SPACE}%"


def share(value: float) -> str:
    """A share as a percentage, that of nearly nothing as such."""
    return f"< {percent(0.01)}" if 0 < value < 1e-4 else percent(100 * value)
