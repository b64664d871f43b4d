"""Pictures of an evaluation: images in rows, each with what the columns make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from testreg.display import picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 8  # images in a picture
INSET = 0.01  # of an image's side: a box comes no nearer to its edges, or one of the whole image is not seen


@dataclass(frozen=True)
class Panel:
    """One picture in a row: an image, and what is drawn over it."""

    title: str
    pixels: Any
    """What matplotlib's `imshow` takes: (h, w, 3) colours, or (h, w) values."""
    boxes: Tensor | None = None
    """(n, 4), left, top, right, bottom, in pixels."""
    over: Any = None
    """(h, w) values that are drawn over the image, half transparent."""
    colours: str = "viridis"
    limits: tuple[float, float] | None = None
    """The values of the first and the last colour; None: the lowest and the highest there are."""


def spread(count: int, shown: int = SHOWN) -> list[int]:
    """The numbers of at most so many images, spread evenly over all."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(shown, count))})


def rows_of(panels: Callable[[int], Sequence[Panel]], count: int, title: str) -> Figure:
    """A picture with a row of panels for each of a few of `count` images, spread over all."""
    return picture_of([panels(number) for number in spread(count)], _draw, title, panel_size=(2.2, 1.9))


def _draw(axis: Axes, panel: Panel) -> None:
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    low, high = panel.limits or (None, None)
    values: dict[str, Any] = {"cmap": panel.colours, "vmin": low, "vmax": high, "interpolation": "nearest"}
    axis.imshow(panel.pixels, **values)
    if panel.over is not None:
        height, width = np.shape(panel.pixels)[:2]
        axis.imshow(panel.over, alpha=0.5, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **values)
    outlined = [withStroke(linewidth=3, foreground="white")]  # or a box of one patch is lost in the image
    for left, top, right, bottom in [] if panel.boxes is None else _inside(panel.boxes, panel.pixels).tolist():
        axis.add_patch(
            Rectangle(
                (left - 0.5, top - 0.5),
                right - left,
                bottom - top,
                fill=False,
                edgecolor="#d55e00",
                lw=1.5,
                path_effects=outlined,
            )
        )
    axis.set_title(panel.title, fontsize=8, parse_math=False)


def _inside(boxes: Tensor, pixels: Any) -> Tensor:
    """Boxes (n, 4) of an image of these pixels (h, w, ...), cut where they come too near to its edges."""
    height, width = np.shape(pixels)[:2]
    inset = INSET * max(height, width)
    return boxes.clamp(min=inset).minimum(boxes.new_tensor([width, height, width, height]) - inset)
