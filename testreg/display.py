"""Show results: as HTML in a notebook, and as figures with panels in rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = TypeVar("P")  # what a panel shows


def picture_of(
    rows: Sequence[Sequence[P]], draw: Callable[[Axes, P], None], title: str, panel_size: tuple[float, float]
) -> Figure:
    """Draw panels in rows and columns as a matplotlib figure, on axes without ticks.

    Args:
        rows: what the panels show, row by row; all rows have the same number of panels.
        draw: draws a panel on its axes.
        panel_size: the width and height of a panel in inches.
    """
    from matplotlib.figure import Figure

    width, height = panel_size
    page = Figure(figsize=(width * len(rows[0]), height * len(rows) + 0.6), layout="constrained")
    axes = page.subplots(len(rows), len(rows[0]), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for row, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(row, panels, strict=True):
            draw(axis, panel)
    page.suptitle(title, fontsize=10, parse_math=False)
    return page


def html(lines: Sequence[str], heads: Sequence[str] = (), rows: Iterable[Sequence[object]] = ()) -> str:
    """HTML with the first line in bold, the other lines below it, and a table that is folded. All text is escaped.

    Args:
        heads: the heads of the table's columns; without any, there is no table.
        rows: the cells of the table, row by row.
    """
    title, *others = map(escape, lines)
    parts = ["<div>", f"<strong>{title}</strong>", *(f"<br>{line}" for line in others)]
    if heads:
        header = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
        body = "".join(f"<tr>{''.join(f'<td>{escape(_text(cell))}</td>' for cell in row)}</tr>" for row in rows)
        table = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
        parts.append(f"<details><summary>Table</summary>{table}</details>")
    return "".join([*parts, "</div>"])


def _text(value: object) -> str:
    """The text of a cell."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
