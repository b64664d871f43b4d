"""Keeps many images in memory: large images are packed into one byte for each value, if that loses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 256  # values that 8 bits can tell apart
SMALL = 2**20  # images of at most so many bytes are not packed, since packing takes a few milliseconds


@dataclass(frozen=True, eq=False)
class PackedImage:
    """An image (C, h, w) or a clip (frames, C, h, w) that takes a quarter of the memory of float32, if it could be
    packed.

    A normalised image that was made of 8-bit pixels has at most 256 different values in each channel. A packed image
    stores a table of these values, and for each pixel the row of its value in the table. Images with more values (e.g.
    resized after they were normalised) and small images are stored as they are.
    """

    rows: Tensor
    """uint8, of the image's shape: the row of each pixel's value in the table; or the image, if it is not packed."""
    values: tuple[Tensor, ...] = ()
    """The table of each channel (of each frame); empty if the image is not packed."""

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
        """The unpacked image (C, h, w) or clip (frames, C, h, w), exactly as it was."""
        if not self.values:
            return self.rows
        channels = self.rows.flatten(0, -3)
        unpacked = [values[rows.int()] for values, rows in zip(self.values, channels, strict=True)]
        return torch.stack(unpacked).view(self.rows.shape)
