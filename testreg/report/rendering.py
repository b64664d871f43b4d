"""Renders the HTML pages from templates, which escape all data, and puts pictures into them."""

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

PHOTOGRAPH_SIDE = 640  # the longest side of a photograph in a page, in pixels; a map has one pixel for each patch


@dataclass(frozen=True)
class Card:
    """An important figure, which a page shows in large print."""

    title: str
    value: str
    note: str
    after: str | None = None
    """The figure with registers, if `value` is the one without; None if the card shows no change."""


@dataclass(frozen=True)
class Picture:
    """A photograph or a map in a page."""

    id: str
    kind: str
    side: str
    """"before" or "after"; "" for a photograph, and in pages that have no before and after."""
    name: str
    largest: str
    """The largest value of a map, as text; "" if its colours stand for no value."""
    alt: str
    uri: str
    """The image file as a data URI."""
    width: int
    height: int
    other: str | None
    """For a map before, the id of the map after, and the other way round; None in pages without before and after."""


@dataclass(frozen=True)
class Row:
    """A photograph and the maps that the page lays over it."""

    id: str
    photograph: Picture
    maps: Sequence[Picture]


def rows_of(panels: Sequence[Sequence[Panel]], *, with_sides: bool = True) -> list[Row]:
    """The rows of a page, from the panels of each image, of which the first is the photograph.

    Args:
        with_sides: whether the page has a before and an after.
    """
    rows = []
    for i, panels_of_image in enumerate(panels):
        photograph, *maps = (_picture(panel, i, with_sides) for panel in panels_of_image)
        rows.append(Row(f"image-{i + 1}", photograph, maps))
    return rows


def _picture(panel: Panel, index: int, with_sides: bool) -> Picture:
    """One panel of the image `index` as a picture in a page."""
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
    """The panel as an image file in a data URI: JPEG for a photograph, PNG for a map."""
    from PIL import Image

    picture = Image.fromarray((panel.pixels * 255).round().byte().numpy())
    buffer = io.BytesIO()
    file_format = "jpeg" if panel.kind == "photograph" else "png"
    if file_format == "jpeg":
        picture.thumbnail((PHOTOGRAPH_SIDE, PHOTOGRAPH_SIDE))
    picture.save(buffer, file_format, quality=88)
    return f"data:image/{file_format};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(template: str, **values: Any) -> str:
    """The page as HTML, from a template and its values, which are escaped."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Write a page. An existing file is replaced only once the new one is complete."""
    with replacing(path) as temporary:
        # Names of folders in the text may have bytes that are not valid UTF-8.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
