"""How a task makes the model's input of an image, where it is not the model's own preprocessing.

The figures of a task depend on it, so that features are kept under its `key`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from testreg.io.preprocessing import Transform

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["squash", "crop"]
IMAGENET_ZOOM = 256 / 224


class Preparation(Protocol):
    """Makes the model's input (3, h, w) of an RGB image."""

    @property
    def key(self) -> str:
        """Identifies what this preparation makes of an image: two that differ have different keys."""

    def __call__(self, image: Image) -> Tensor: ...


@dataclass(frozen=True)
class Normalisation:
    """The mean and standard deviation of each channel, of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (..., 3, h, w) in [0, 1], normalised."""
        return tv.normalize(pixels, list(self.mean), list(self.std))


AS_THEY_ARE = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""Leaves colours in [0, 1]."""


def normalisation_of(transform: Transform) -> Normalisation:
    """What a model's preprocessing does to colours: read off what it makes of a black and of a white image.

    Raises:
        ValueError: it does more to them than to shift and to scale each channel.
    """
    black, white = (transform(_plain_image(value)).float().flatten(1) for value in (0, 255))
    if any(float((values - values[:, :1]).abs().max()) > 1e-3 for values in (black, white)):
        raise ValueError("the model's preprocessing does not normalise each channel by itself: pass another transform")
    scale = (white - black)[:, 0].double()
    mean, std = -black[:, 0].double() / scale, 1 / scale
    return Normalisation(
        tuple(round(value, 6) for value in mean.tolist()), tuple(round(value, 6) for value in std.tolist())
    )


def _plain_image(value: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (256, 256), (value,) * 3)


@dataclass(frozen=True)
class Own:
    """The model's own preprocessing."""

    transform: Transform

    @property
    def key(self) -> str:
        """A hash of what it makes of a picture of noise, since transforms do not say what they do."""
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
        made = self.transform(Image.fromarray(noise)).float()
        rounded = (made * 256).round().short().numpy().tobytes()
        return f"own {tuple(made.shape)} {hashlib.sha256(rounded).hexdigest()}"

    def __call__(self, image: Image) -> Tensor:
        return self.transform(image)


@dataclass(frozen=True)
class Native:
    """The image at its own size, with zeros at the right and bottom up to whole patches."""

    normalise: Normalisation
    patch_size: tuple[int, int]

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        pixels = self.normalise(pixels_of(image))
        rows, columns = self.patch_size
        height, width = pixels.shape[-2:]
        return F.pad(pixels, (0, -width % columns, 0, -height % rows))


@dataclass(frozen=True)
class Whole:
    """The image at its own size, or squashed to a square."""

    normalise: Normalisation
    size: int | None

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        pixels = pixels_of(image)
        return self.normalise(pixels if self.size is None else tv.resize(pixels, [self.size] * 2, antialias=True))


@dataclass(frozen=True)
class Square:
    """The image as a square: squashed, or its short side resized and the middle cropped."""

    normalise: Normalisation
    size: int
    fit: Fit = "squash"
    zoom: float = 1.0
    """The short side over the crop, where it is cropped: 256 / 224 as ImageNet is evaluated."""

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        return self.normalise(tv.to_dtype(self.fitted(tv.pil_to_tensor(image)), torch.float32, scale=True))

    def fitted(self, pixels: Tensor, *, nearest: bool = False) -> Tensor:
        """Pixels (channels, h, w) made square; those of a mask by the nearest."""
        how = tv.InterpolationMode.NEAREST if nearest else tv.InterpolationMode.BICUBIC
        if self.fit == "squash":
            return tv.resize(pixels, [self.size, self.size], how, antialias=not nearest)
        short = round(self.size * self.zoom)
        return tv.center_crop(tv.resize(pixels, [short], how, antialias=not nearest), [self.size, self.size])


def pixels_of(image: Image) -> Tensor:
    """The pixels (3, h, w) of an RGB image, float32 in [0, 1]."""
    return tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)


def resized_within(shape: Sequence[int], short: int, long: int) -> tuple[int, int]:
    """Height and width (of a shape ..., h, w) scaled alike, so that no side exceeds its bound, as large as can be."""
    height, width = shape[-2:]
    scale = min(short / min(height, width), long / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def hashed(value: object) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
