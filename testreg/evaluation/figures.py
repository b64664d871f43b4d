"""Pictures of an evaluation: a row for each image, with a panel for the truth and one for each model's prediction."""

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

IMAGES_SHOWN = 8  # rows of a picture, at most
INSET = 0.01  # distance that boxes keep from the image's edge, as a share of its longer side: else they are not seen


@dataclass(frozen=True)
class Panel:
    """One panel of a picture: an image or a map, and what is drawn over it."""

    title: str
    pixels: Any
    """(h, w, 3) colours or (h, w) values, as matplotlib's `imshow` takes them."""
    boxes: Tensor | None = None
    """Boxes to draw, (n, 4): left, top, right, bottom in pixels."""
    over: Any = None
    """(h, w) values that are drawn over the image, half transparent."""
    colours: str = "viridis"
    """The name of matplotlib's colour map for values."""
    limits: tuple[float, float] | None = None
    """The values that get the first and the last colour; None for the lowest and the highest value."""


def evenly_spaced(count: int, shown: int = IMAGES_SHOWN) -> list[int]:
    """The indices of at most `shown` of `count` images, evenly spaced from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(shown, count))})


def picture_of_rows(panels: Callable[[int], Sequence[Panel]], count: int, title: str) -> Figure:
    """A picture of a few of `count` images, evenly spaced. `panels` makes the row of an image from its index."""
    return picture_of([panels(number) for number in evenly_spaced(count)], _draw, title, panel_size=(2.2, 1.9))


def _draw(axis: Axes, panel: Panel) -> None:
    """Draw one panel."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    low, high = panel.limits or (None, None)
    values: dict[str, Any] = {"cmap": panel.colours, "vmin": low, "vmax": high, "interpolation": "nearest"}
    axis.imshow(panel.pixels, **values)
    if panel.over is not None:
        height, width = np.shape(panel.pixels)[:2]
        axis.imshow(panel.over, alpha=0.5, extent=(-0.5, width - 0.5, height - 0.5, -0.5), **values)
    outlined = [withStroke(linewidth=3, foreground="white")]  # without it, a box of one patch is hard to see
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
    """The boxes (n, 4) on an image `pixels` (h, w, ...), cut so that they keep a distance from the image's edges."""
    height, width = np.shape(pixels)[:2]
    inset = INSET * max(height, width)
    return boxes.clamp(min=inset).minimum(boxes.new_tensor([width, height, width, height]) - inset)
