"""How results show themselves: as HTML in a notebook, and as pictures in rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = TypeVar("P")


def picture_of(
    rows: Sequence[Sequence[P]], draw: Callable[[Axes, P], None], title: str, panel_size: tuple[float, float]
) -> Figure:
    """A picture with all panels of each row side by side, on axes without ticks.

    Args:
        draw: draws a panel on its axes.
        panel_size: width and height in inches.
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
    """The first line in bold, the others below it, and a table, folded; everything is escaped."""
    title, *others = map(escape, lines)
    parts = ["<div>", f"<strong>{title}</strong>", *(f"<br>{line}" for line in others)]
    if heads:
        header = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
        body = "".join(f"<tr>{''.join(f'<td>{escape(_text(cell))}</td>' for cell in row)}</tr>" for row in rows)
        table = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
        parts.append(f"<details><summary>Table</summary>{table}</details>")
    return "".join([*parts, "</div>"])


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
