"""Dense features: the patches of the last block as maps, of images that are padded around to whole patches."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from testreg.families import Tower
from testreg.measure.tokens import global_token, normed_tokens

Edges = tuple[int, int, int, int]


def edges_around(height: int, width: int, patch: tuple[int, int]) -> Edges:
    """Pixels to add at the left, right, top and bottom of an image so that it has whole patches."""
    rows, columns = -height % patch[0], -width % patch[1]
    return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2


def dense_features(tower: Tower, images: Tensor) -> tuple[Tensor, Tensor]:
    """The patches (B, C, rows, columns) behind the final norm, and the global token (B, C), of images of any size."""
    height, width = images.shape[-2:]
    padded = F.pad(images, edges_around(height, width, tower.patch_size))
    tokens = normed_tokens(tower, padded)[0].float()
    patches = tokens[:, tower.patches(padded)].transpose(1, 2).unflatten(2, tower.grid(padded))
    return patches, global_token(tokens, tower)


def resized(values: Tensor, size: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Maps (B, channels, rows, columns) of padded images of a size, as pixels (B, channels, height, width) of it."""
    height, width = size
    left, right, top, bottom = edges_around(height, width, patch)
    full = F.interpolate(values, (height + top + bottom, width + left + right), mode="bilinear", align_corners=False)
    return full[..., top : top + height, left : left + width]
