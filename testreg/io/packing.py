"""Images that are kept in memory while others are run: large ones a byte a value, where nothing is lost by that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 256  # of a pixel of 8 bits
SMALL = 2**20  # bytes up to which an image is kept as it is: packing one takes a few milliseconds


@dataclass(frozen=True, eq=False)
class PackedImage:
    """An image (C, h, w), or a clip (frames, C, h, w), that takes a quarter of its memory, if it is large and was made
    of pixels of 8 bits.

    However these were normalised, each channel then has at most 256 different values: kept are a table of them, and for
    each pixel its row there. An image with more values, such as one that was resized after it was normalised, is kept
    as it is.
    """

    rows: Tensor
    """uint8 of the image's shape, or the image itself."""
    values: tuple[Tensor, ...] = ()
    """The values of each channel (of each frame); empty if the image was not packed."""

    @classmethod
    def of(cls, image: Tensor) -> PackedImage:
        """Pack an image (C, h, w) or a clip (frames, C, h, w)."""
        if image.nbytes <= SMALL:
            return cls(image)
        channels = [channel.unique(return_inverse=True) for channel in image.reshape(-1, *image.shape[-2:])]
        if any(len(values) > LEVELS for values, _ in channels):
            return cls(image)
        rows = torch.stack([rows.byte() for _, rows in channels]).view(image.shape)
        return cls(rows, tuple(values for values, _ in channels))

    @property
    def image(self) -> Tensor:
        """The image (C, h, w) or the clip (frames, C, h, w), value for value."""
        if not self.values:
            return self.rows
        channels = self.rows.flatten(0, -3)
        unpacked = [values[rows.int()] for values, rows in zip(self.values, channels, strict=True)]
        return torch.stack(unpacked).view(self.rows.shape)
