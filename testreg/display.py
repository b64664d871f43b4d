"""How objects show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


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
