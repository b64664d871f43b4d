"""`testreg.compare`: draws what registers change on a few images, as maps over the photographs."""

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
"""Left, top, right and bottom, in pixels, of the part of a photograph that the model gets after its preprocessing."""

_MIN_SIDE, _MAX_SIDE = 240, 640  # bounds of the longer side of a drawn photograph, in pixels
_DPI = 100
_GAP = 0.45  # inches between rows, where titles are


@dataclass(frozen=True, repr=False)
class Comparison:
    """Maps of a model on some images, without and with registers. `testreg.compare` makes it.

    A notebook shows it as a picture.

    Example:
        >>> testreg.compare(model, "photos/00.png", neurons).before.norms.shape
        torch.Size([1, 4, 4])
    """

    photographs: Sequence[Tensor]
    """The photographs, (h, w, 3) in [0, 1], each in its own size."""
    boxes: Sequence[Box]
    """The part of each photograph that its maps cover."""
    block: int
    """The block after which norms are compared."""
    before: Maps
    """Maps without registers: norms after `block`, attention and features of the last block."""
    after: Maps
    """The same maps with registers."""
    model: str
    """The name of the model's checkpoint, or else of its class."""

    def __repr__(self) -> str:
        images = f"{len(self.photographs)} image{'s' * (len(self.photographs) != 1)}"
        return (
            f"Comparison of {plain(self.model)} on {images}, norms after block {self.block}\n"
            f"{table(self.before, self.after)}"
        )

    def plot(self, max_images: int = 4, opacity: float = 0.75) -> Figure:
        """Draw the maps before and after over the photographs, in the photographs' proportions and, within bounds,
        their size.

        Args:
            max_images: draw only so many of the images, the first ones.
            opacity: opacity of the maps, from 0 to 1, over the photograph.

        Returns:
            A matplotlib figure. Beside each photograph it has two rows of maps, before and after. Norms before and
            after have the same colour scale; each attention map has its own.
        """
        from matplotlib.figure import Figure

        count, colours = min(max_images, len(self.photographs)), feature_colours(self.before, self.after)
        sizes = [_size_in_inches(each) for each in self.photographs[:count]]
        kinds = ["norms", "features"] if self.before.attention is None else ["norms", "attention", "features"]
        width = max(width for _, width in sizes) * (1 + len(kinds)) + 0.2
        heights = [height + _GAP for height, _ in sizes for _ in range(2)]
        page = Figure(figsize=(width, sum(heights)), dpi=_DPI, layout="constrained")
        places = page.add_gridspec(2 * count, 1 + len(kinds), height_ratios=heights)
        for i, picture in enumerate(self.photographs[:count]):
            panel_of = {
                panel.name: panel for panel in panels(torch.zeros(3, 1, 1), i, self.before, self.after, colours)
            }
            _draw(page.add_subplot(places[2 * i : 2 * i + 2, 0]), picture, "photograph", "none")
            for row, side in enumerate(("before", "after"), start=2 * i):
                for column, kind in enumerate(kinds, start=1):
                    axis, panel = page.add_subplot(places[row, column]), panel_of[f"{kind} {side}"]
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
    """Compare a model without and with registers on a few images: norms, attention and features, as maps.

    Example:
        >>> comparison = testreg.compare(model, ["photos/00.png", "photos/01.png"], neurons)
        >>> comparison
        Comparison of timm:vit_base_patch16_clip_224... on 2 images, norms after block ...
                                      before     after
        outlier patches ...
        >>> comparison.plot().savefig("comparison.png")

    Args:
        model: a vision transformer, or any model that contains one. It is not changed.
        images: a few images, as `testreg.attention` takes them. Photographs are drawn in their own size, within bounds.
        neurons: the register neurons, as `testreg.patch` takes them. None: those of a patched model, or else the
            bundled list of the model's checkpoint.
        block: the block after which norms are compared; None for the block after which the largest norm of a patch is
            the largest multiple of the median norm.
        transform: maps a PIL image to a tensor (3, h, w); None for the preprocessing of the model's library.

    Raises:
        TypeError, ValueError: the model or an argument does not fit.
        RuntimeError: neurons are given for a model that is patched already.
    """
    tower = find_tower(model)
    if block is not None and not -tower.depth <= block < tower.depth:
        raise ValueError(f"block={block} is out of range: the model has {tower.depth} blocks")
    photographs, boxes, batch = _photographs_and_input(model, images, transform)
    uses_own_registers = is_patched(model) and neurons is None
    # `verified=True` suppresses the warning that neurons are not verified: the picture will show what they do.
    registers_added = (
        nullcontext() if uses_own_registers else patched(model, replace(resolve(neurons, model), verified=True))
    )
    with registers_added, tower.evaluating():
        with disabled(model):
            block = _block_of_largest_norm(tower, batch) if block is None else block % tower.depth
            with_attention = _attention_is_observable(tower, batch[:1])
        before, after = maps_before_and_after(model, batch, block, attention=with_attention)
    return Comparison(photographs, boxes, block, before, after, describe_model(model, tower)["name"])


def _photographs_and_input(
    model: nn.Module, images: Images, transform: Transform | None
) -> tuple[list[Tensor], list[Box], Tensor]:
    """The photographs (h, w, 3), the part of each that the model gets, and the model's input (B, 3, h, w)."""
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
    """The part of the image that remains after a transform's cropping.

    It is found by transforming an image whose red grows from left to right, and whose green grows from top to bottom.
    If a transform does more than resize, crop and normalise, the whole image is returned.
    """
    from PIL import Image as PILImage

    width, height = image.size
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width).round()[None]
    ramp[..., 1] = np.linspace(0, 255, height).round()[:, None]
    black, white = (transform(PILImage.new("RGB", image.size, colour)).double() for colour in ("black", "white"))
    # (3, h, w): where each pixel was in the image, from 0 to 1: across in the first channel, down in the second
    share = (transform(PILImage.fromarray(ramp)).double() - black) / (white - black)
    horizontal, vertical = _edges(share[0].mean(0)), _edges(share[1].mean(1))
    if horizontal is None or vertical is None:
        return 0, 0, width, height
    return horizontal[0] * width, vertical[0] * height, horizontal[1] * width, vertical[1] * height


def _edges(share: Tensor) -> tuple[float, float] | None:
    """The two ends, within [0, 1], of a row of pixels whose centres are at `share` (n,); None if not evenly spaced."""
    positions = torch.arange(len(share), dtype=share.dtype)
    centred = positions - positions.mean()
    slope = (centred * share).sum() / centred.square().sum().clamp(min=1)
    line = share.mean() + slope * centred
    if not share.isfinite().all() or slope <= 0 or (share - line).abs().max() > 0.05:
        return None
    half_length = slope * len(share) / 2
    return max(float(share.mean() - half_length), 0), min(float(share.mean() + half_length), 1)


def _block_of_largest_norm(tower: Tower, images: Tensor) -> int:
    """The block after which the ratio of the largest to the median norm of an image's patches, averaged over the
    images, is largest."""
    norms = token_norms(tower, images)[..., tower.patches(images)]
    return int((norms.amax(-1) / norms.median(-1).values).mean(1).argmax())


def _attention_is_observable(tower: Tower, images: Tensor) -> bool:
    """Whether the tower computes attention in a way that testreg can read."""
    try:
        attention_to_patches(tower, images)
    except RuntimeError:
        return False
    return True


def _size_in_inches(picture: Tensor) -> tuple[float, float]:
    """The height and width in inches in which a photograph (h, w, 3) is drawn."""
    height, width = picture.shape[:2]
    scale = min(max(max(height, width), _MIN_SIDE), _MAX_SIDE) / max(height, width)
    return height * scale / _DPI, width * scale / _DPI


def _draw(axis: Axes, picture: Tensor, title: str, edge: Any) -> None:
    """Draw a photograph with a title, and with a border whose colour is `edge`."""
    axis.imshow(picture.numpy())
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)
    for spine in axis.spines.values():
        spine.set_edgecolor(edge)
