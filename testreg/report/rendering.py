"""What the pages have in common: their templates, which escape what they are given, and pictures as parts of a page."""

from __future__ import annotations

import base64
import functools
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from testreg.files import replacing
from testreg.report.map_figures import Panel

PHOTOGRAPH_SIDE = 640  # pixels in the page, at most; the maps have one for each patch


@dataclass(frozen=True)
class Card:
    """A figure that matters, in large print; with `after`, it is a change from `value` to that."""

    title: str
    value: str
    note: str
    after: str | None = None


@dataclass(frozen=True)
class Picture:
    """A photograph or a map."""

    id: str
    kind: str
    side: str
    """"before" or "after"; "" for the photograph, and where there is one side."""
    name: str
    largest: str
    """The largest value of a map; "" if it has no scale."""
    alt: str
    uri: str
    width: int
    height: int
    other: str | None
    """The id of the same map of the other side."""


@dataclass(frozen=True)
class Row:
    """A photograph, and the maps that are laid over it."""

    id: str
    photograph: Picture
    maps: Sequence[Picture]


def rows_of(panels: Sequence[Sequence[Panel]], *, with_sides: bool = True) -> list[Row]:
    """One row for each photograph, from its panels, of which the photograph is the first.

    Args:
        with_sides: whether there is a before and an after.
    """
    rows = []
    for i, of_image in enumerate(panels):
        photograph, *maps = (_picture(panel, i, with_sides) for panel in of_image)
        rows.append(Row(f"image-{i + 1}", photograph, maps))
    return rows


def _picture(panel: Panel, index: int, with_sides: bool) -> Picture:
    height, width = panel.pixels.shape[:2]
    largest = "" if panel.largest is None else f"{panel.largest:.3g}"
    side = panel.side if with_sides else ""
    name = f"{panel.kind} {side}".strip()
    other = {"before": "after", "after": "before"}.get(side)
    prefix = f"image-{index + 1}-{panel.kind}"
    return Picture(
        id=f"{prefix}-{side}".removesuffix("-"),
        kind=panel.kind,
        side=side,
        name=name,
        largest=largest,
        alt=f"Image {index + 1}: {name}" + (f", at most {largest}" if largest else ""),
        uri=_data_uri(panel),
        width=width,
        height=height,
        other=None if other is None else f"{prefix}-{other}",
    )


def _data_uri(panel: Panel) -> str:
    from PIL import Image

    picture = Image.fromarray((panel.pixels * 255).round().byte().numpy())
    target = io.BytesIO()
    file_format = "jpeg" if panel.kind == "photograph" else "png"
    if file_format == "jpeg":
        picture.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    picture.save(target, file_format, quality=88)
    return f"data:image/{file_format};base64,{base64.b64encode(target.getvalue()).decode()}"


def render(template: str, **values: Any) -> str:
    """The page. Whatever comes from outside is escaped."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def write_page(path: str | os.PathLike[str], text: str) -> None:
    with replacing(path) as temporary:
        # Names of folders may be no text, and hold bytes that UTF-8 does not have.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
