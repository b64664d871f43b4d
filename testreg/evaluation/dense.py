"""Dense features: the patch tokens of the last block as a map, for images of any size.

An image whose sides are no multiples of the patch size is padded with zeros on all sides.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from testreg.families import Tower
from testreg.measure.tokens import global_token, normed_tokens

Edges = tuple[int, int, int, int]
"""Pixels at the left, right, top and bottom."""


def edges_around(height: int, width: int, patch: tuple[int, int]) -> Edges:
    """How many pixels to add on each side of an image so that its sides are multiples of the patch size."""
    rows, columns = -height % patch[0], -width % patch[1]
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def dense_features(tower: Tower, images: Tensor) -> tuple[Tensor, Tensor]:
    """The patch tokens (B, C, rows, columns) and the global token (B, C) after the final norm.

    The global token is CLS, or the mean of the patches in models without CLS.
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, edges_around(height, width, tower.patch_size))
    tokens = normed_tokens(tower, padded)[0].float()
    patches = tokens[:, tower.patches(padded)].transpose(1, 2).unflatten(2, tower.grid(padded))
    return patches, global_token(tokens, tower)


def resized(values: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Resize maps (B, channels, ...) of the padded images' patches, or finer ones, to pixels, and cut off the padding.

    Args:
        size: height and width of the images before they were padded; the result is (B, channels, height, width).
        patch: height and width of a patch in pixels.
    """
    height, width = size
    left, right, top, bottom = edges_around(height, width, patch)
    full = F.interpolate(values, (height + top + bottom, width + left + right), mode="bilinear", align_corners=False)
    return full[..., top : top + height, left : left + width]
