"""Preparations: how a task turns an image into the model's input, where the model's own preprocessing does not fit.

Features depend on the preparation, so its `key` is part of the key under which features are cached.
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
"""How an image becomes a square: its sides are scaled differently, or its middle is cropped."""
IMAGENET_ZOOM = 256 / 224
"""The short side of the resized image over the side of the crop, as ImageNet is usually evaluated."""


class Preparation(Protocol):
    """Turns an RGB image into the model's input (3, h, w)."""

    @property
    def key(self) -> str:
        """Identifies the preparation in the cache: preparations with different results have different keys."""

    def __call__(self, image: Image) -> Tensor: ...


@dataclass(frozen=True)
class Normalisation:
    """Subtracts the mean of each channel from pixels in [0, 1], and divides by its standard deviation."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        """The normalised pixels (..., 3, h, w), from pixels in [0, 1]."""
        return tv.normalize(pixels, list(self.mean), list(self.std))


AS_THEY_ARE = Normalisation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""The normalisation that changes nothing: pixels stay in [0, 1]."""


def normalisation_of(transform: Transform) -> Normalisation:
    """The normalisation in a model's preprocessing, found by what it makes of a black and of a white image.

    Raises:
        ValueError: the preprocessing does more to colours than shift and scale each channel.
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
    """An RGB image of one grey value."""
    from PIL import Image

    return Image.new("RGB", (256, 256), (value,) * 3)


@dataclass(frozen=True)
class ModelPreprocessing:
    """The model's own preprocessing."""

    transform: Transform

    @property
    def key(self) -> str:
        """A hash of the result for an image of noise, since a transform has no description that could be hashed."""
        from PIL import Image

        noise = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)
        made = self.transform(Image.fromarray(noise)).float()
        rounded = (made * 256).round().short().numpy().tobytes()
        return f"own {tuple(made.shape)} {hashlib.sha256(rounded).hexdigest()}"

    def __call__(self, image: Image) -> Tensor:
        return self.transform(image)


@dataclass(frozen=True)
class PaddedToPatches:
    """Keeps the image's size, and pads it with zeros at the right and bottom to a multiple of the patch size."""

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
class Uncropped:
    """Keeps the whole image: at its own size, or squashed to a square."""

    normalise: Normalisation
    size: int | None
    """Side of the square in pixels; None to keep the image's size."""

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        pixels = pixels_of(image)
        return self.normalise(pixels if self.size is None else tv.resize(pixels, [self.size] * 2, antialias=True))


@dataclass(frozen=True)
class Square:
    """Makes the image a square: squashes it, or resizes its short side and crops the middle."""

    normalise: Normalisation
    size: int
    fit: Fit = "squash"
    zoom: float = 1.0
    """For "crop": the short side of the resized image over the side of the crop."""

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        return self.normalise(tv.to_dtype(self.fitted(tv.pil_to_tensor(image)), torch.float32, scale=True))

    def fitted(self, pixels: Tensor, *, nearest: bool = False) -> Tensor:
        """Pixels (channels, h, w) as a square (channels, size, size); `nearest` is for masks, to keep their values."""
        how = tv.InterpolationMode.NEAREST if nearest else tv.InterpolationMode.BICUBIC
        if self.fit == "squash":
            return tv.resize(pixels, [self.size, self.size], how, antialias=not nearest)
        short = round(self.size * self.zoom)
        return tv.center_crop(tv.resize(pixels, [short], how, antialias=not nearest), [self.size, self.size])


def pixels_of(image: Image) -> Tensor:
    """The pixels (3, h, w) of an RGB image, float32 in [0, 1]."""
    return tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)


def resized_within(shape: Sequence[int], short: int, long: int) -> tuple[int, int]:
    """The largest height and width with the proportions of `shape` (..., h, w) that fit into two bounds.

    The shorter side is at most `short`, and the longer side is at most `long`.
    """
    height, width = shape[-2:]
    scale = min(short / min(height, width), long / max(height, width))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def hashed(value: object) -> str:
    """The SHA-256, in hexadecimal, of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
