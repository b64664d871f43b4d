"""What registers change on a few images, drawn over the photographs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from testreg.families import Tower, find_tower
from testreg.files import plain
from testreg.io.decoding import decoded
from testreg.io.images import Images
from testreg.io.preprocessing import Transform, transform_for
from testreg.measure.attention import attention_to_patches
from testreg.measure.maps import image_batch, listed_images
from testreg.measure.outliers import token_norms
from testreg.neurons import AnyNeurons, describe_model, resolve
from testreg.register import disabled, is_patched, patched
from testreg.report.map_figures import (
    AFTER,
    BEFORE,
    Maps,
    feature_colours,
    maps_before_and_after,
    panels,
    photograph,
    scales_of,
    table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL.Image import Image

Box = tuple[float, float, float, float]
"""Left, top, right and bottom of the part of a photograph that a model sees, in pixels."""

_SMALLEST, _LARGEST = 240, 640  # pixels of the longer side of a photograph, as it is drawn
_DPI = 100
_GAP = 0.45  # inches between rows, for titles


@dataclass(frozen=True, repr=False)
class Comparison:
    """A model on some images, without and with its registers: `testreg.compare` makes it.

    In a notebook it shows itself.

    Example:
        >>> testreg.compare(model, "photos/00.png", neurons).before.norms.shape
        torch.Size([1, 4, 4])
    """

    photographs: Sequence[Tensor]
    """(h, w, 3) in [0, 1], each of its own size."""
    boxes: Sequence[Box]
    """The part of each photograph that the maps lie over."""
    block: int
    """The block after which norms are compared."""
    before: Maps
    """Norms after `block`; attention and features of the last block."""
    after: Maps
    model: str
    """The name of its checkpoint, or of its class."""

    def __repr__(self) -> str:
        images = f"{len(self.photographs)} image{'s' * (len(self.photographs) != 1)}"
        return (
            f"Comparison of {plain(self.model)} on {images}, norms after block {self.block}\n"
            f"{table(self.before, self.after)}"
        )

    def plot(self, max_images: int = 4, opacity: float = 0.75) -> Figure:
        """The maps before and after, over the photographs, at the photographs' size and aspect.

        Args:
            max_images: at most so many of the images, the first.
            opacity: of the maps; the photograph shows through.

        Returns:
            A matplotlib figure: a photograph, and beside it two rows, before and after. Norms share a scale; attention
            has one each.
        """
        from matplotlib.figure import Figure

        count, colours = min(max_images, len(self.photographs)), feature_colours(self.before, self.after)
        sizes = [_drawn_size(each) for each in self.photographs[:count]]
        kinds = ["norms", "features"] if self.before.attention is None else ["norms", "attention", "features"]
        width = max(width for _, width in sizes) * (1 + len(kinds)) + 0.2
        heights = [height + _GAP for height, _ in sizes for _ in range(2)]
        page = Figure(figsize=(width, sum(heights)), dpi=_DPI, layout="constrained")
        places = page.add_gridspec(2 * count, 1 + len(kinds), height_ratios=heights)
        for i, picture in enumerate(self.photographs[:count]):
            made = {panel.name: panel for panel in panels(torch.zeros(3, 1, 1), i, self.before, self.after, colours)}
            _draw(page.add_subplot(places[2 * i : 2 * i + 2, 0]), picture, "photograph", "none")
            for row, side in enumerate(("before", "after"), start=2 * i):
                for column, kind in enumerate(kinds, start=1):
                    axis, panel = page.add_subplot(places[row, column]), made[f"{kind} {side}"]
                    largest = "" if panel.largest is None else f", max {panel.largest:.3g}"
                    _draw(axis, picture, panel.name + largest, BEFORE if side == "before" else AFTER)
                    left, top, right, bottom = self.boxes[i]
                    axis.imshow(panel.pixels.numpy(), extent=(left, right, bottom, top), alpha=opacity)
                    axis.set(xlim=(0, picture.shape[1]), ylim=(picture.shape[0], 0))
        others = " and ".join(kind for kind in kinds if kind != "norms")
        title = f"{self.model}: norms after block {self.block}, {others} after the last block"
        page.suptitle(title, fontsize=10, parse_math=False)
        page.supxlabel(scales_of(self.before), fontsize=8)
        return page

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.plot().savefig(file, format="png")
        return file.getvalue()

    def _repr_html_(self) -> str:
        picture = base64.b64encode(self._repr_png_()).decode()
        return (
            f'<img style="max-width: 100%" src="data:image/png;base64,{picture}" '
            f'alt="Norms, attention and features before and after"/><pre>{self!r}</pre>'
        )


def compare(
    model: nn.Module,
    images: Images,
    neurons: AnyNeurons = None,
    *,
    block: int | None = None,
    transform: Transform | None = None,
) -> Comparison:
    """What registers change: norms, attention and features before and after, as maps over the images.

    Example:
        >>> comparison = testreg.compare(model, ["photos/00.png", "photos/01.png"], neurons)
        >>> comparison
        Comparison of timm:vit_base_patch16_clip_224... on 2 images, norms after block ...
                                      before     after
        outlier patches ...
        >>> comparison.plot().savefig("comparison.png")

    Args:
        model: a vision tower, or any model that contains one; it is left as it was.
        images: a few, as `testreg.attention` takes them: photographs are drawn at their own size.
        neurons: as `testreg.patch` takes them. None: a patched model's own, else the bundled list of its checkpoint.
        block: the block after which norms are compared; None for the one where the largest stand out most.
        transform: PIL image -> tensor (3, h, w); None takes the preprocessing that the model's own library names.

    Raises:
        TypeError, ValueError: the model or an argument does not fit.
        RuntimeError: neurons are given for a model that is patched already.
    """
    tower = find_tower(model)
    if block is not None and not -tower.depth <= block < tower.depth:
        raise ValueError(f"block={block} is out of range: the model has {tower.depth} blocks")
    photographs, boxes, batch = _seen(model, images, transform)
    own = is_patched(model) and neurons is None
    # What the neurons do is about to be seen, so `patch` need not warn that they are not verified.
    change = nullcontext() if own else patched(model, replace(resolve(neurons, model), verified=True))
    with change, tower.evaluating():
        with disabled(model):
            block = _block_of_largest_norm(tower, batch) if block is None else block % tower.depth
            observable = _is_observable(tower, batch[:1])
        before, after = maps_before_and_after(model, batch, block, attention=observable)
    return Comparison(photographs, boxes, block, before, after, describe_model(model, tower)["name"])


def _seen(model: nn.Module, images: Images, transform: Transform | None) -> tuple[list[Tensor], list[Box], Tensor]:
    """Photographs, the parts of them that the model sees, and its input (B, 3, h, w)."""
    items = listed_images(images)
    if all(isinstance(item, Tensor) and item.is_floating_point() for item in items):
        batch = image_batch(model, images)
        pictures = [photograph(image) for image in batch]
        return pictures, [(0, 0, picture.shape[1], picture.shape[0]) for picture in pictures], batch
    transform = transform or transform_for(model)
    files = [decoded(item) for item in items]
    batch = image_batch(model, files, transform)
    pictures = [torch.from_numpy(np.asarray(file).copy()).float() / 255 for file in files]
    return pictures, [_box(file, transform) for file in files], batch


def _box(image: Image, transform: Transform) -> Box:
    """The part of the image that a transform leaves: what it makes of a ramp from left to right, and of one downwards.

    A transform that does more than resizing, cropping and normalising is taken to leave all of it.
    """
    from PIL import Image as images

    width, height = image.size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width).round()[None]
    ramp[..., 1] = np.linspace(0, 255, height).round()[:, None]
    black, white = (transform(images.new("RGB", image.size, colour)).double() for colour in ("black", "white"))
    share = (transform(images.fromarray(ramp)).double() - black) / (white - black)  # of the way across, (3, h, w)
    horizontal, vertical = _edges(share[0].mean(0)), _edges(share[1].mean(1))
    if horizontal is None or vertical is None:
        return 0, 0, width, height
    return horizontal[0] * width, vertical[0] * height, horizontal[1] * width, vertical[1] * height


def _edges(share: Tensor) -> tuple[float, float] | None:
    """First and last edge of pixels whose centres lie on a straight line at these values; None if they do not."""
    place = torch.arange(len(share), dtype=share.dtype)
    centred = place - place.mean()
    slope = (centred * share).sum() / centred.square().sum().clamp(min=1)
    line = share.mean() + slope * centred
    if not share.isfinite().all() or slope <= 0 or (share - line).abs().max() > 0.05:
        return None
    half = slope * len(share) / 2
    return max(float(share.mean() - half), 0), min(float(share.mean() + half), 1)


def _block_of_largest_norm(tower: Tower, images: Tensor) -> int:
    """The block after which the largest norm of the patches is the largest multiple of their median."""
    norms = token_norms(tower, images)[..., tower.patches(images)]
    return int((norms.amax(-1) / norms.median(-1).values).mean(1).argmax())


def _is_observable(tower: Tower, images: Tensor) -> bool:
    try:
        attention_to_patches(tower, images)
    except RuntimeError:
        return False
    return True


def _drawn_size(picture: Tensor) -> tuple[float, float]:
    """Height and width, in inches, at which a photograph (h, w, 3) is drawn."""
    height, width = picture.shape[:2]
    scale = min(max(max(height, width), _SMALLEST), _LARGEST) / max(height, width)
    return height * scale / _DPI, width * scale / _DPI


def _draw(axis: Axes, picture: Tensor, title: str, edge: Any) -> None:
    axis.imshow(picture.numpy())
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    for spine in axis.spines.values():
        spine.set_edgecolor(edge)
