"""Takes apart what image and video processors of transformers return: one tensor for each image or clip.

Processors stack, pad, tile or pack images, each family in its own way. Calibration needs them one by one. The functions
`separate_*` get the configuration of the tower and the processor's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PIXELS = ("pixel_values", "pixel_values_videos")  # the keys under which a processor returns pixels


def pixels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The pixels that a processor returns, as one tensor.

    Raises:
        ValueError: the pixels are a list of images of different sizes.
    """
    pixels = next(inputs[name] for name in PIXELS if inputs.get(name) is not None)
    if isinstance(pixels, list | tuple):
        shapes = {tuple(torch.as_tensor(each).shape) for each in pixels}
        if len(shapes) > 1:
            raise ValueError(f"a processor returned pixels of several shapes ({shapes}): pass them one at a time")
        return torch.stack([torch.as_tensor(each) for each in pixels])
    return torch.as_tensor(pixels)


def separate_images(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The images (3, h, w) in a batch (B, 3, h, w), or all tiles in a batch of tiled images (B, tiles, 3, h, w).

    A tile is an image for the tower. Tiles of zeros are left out: they only fill up images that have fewer tiles than
    others. If there is a `pixel_attention_mask`, it says instead what is left out: the padding that it marks is cut
    off, and so are tiles that are all padding.
    """
    pixels = pixels_of(inputs)
    images = pixels.reshape(-1, *pixels.shape[-3:])
    mask = inputs.get("pixel_attention_mask")
    if mask is None:
        return [image for image in images if pixels.ndim == 4 or image.any()]
    masks = torch.as_tensor(mask).bool().reshape(-1, *pixels.shape[-2:])  # (n, h, w)
    return [
        image[:, : int(is_shown.any(1).sum()), : int(is_shown.any(0).sum())]
        for image, is_shown in zip(images, masks, strict=True)
        if is_shown.any()
    ]


def separate_clips(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The clips (frames, 3, h, w) in a batch (B, frames, 3, h, w), or in a row of frames (B * frames, 3, h, w)."""
    pixels = pixels_of(inputs)
    return list(pixels.reshape(-1, config.num_frames, *pixels.shape[-3:]))


def separate_sizes(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """For Pixtral: the images (3, h, w) in a batch, without the padding that made them all the same size."""
    pixels, sizes = pixels_of(inputs), torch.as_tensor(inputs["image_sizes"]).tolist()
    return [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]


def separate_padded_patches(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """For SigLIP 2: the images (3, h, w), from their patches' pixels (B, N, p * p * 3), padded to N patches."""
    size, images = config.patch_size, []
    for patches, shape in zip(pixels_of(inputs), torch.as_tensor(inputs["spatial_shapes"]).tolist(), strict=True):
        rows, columns = shape
        pixels = patches[: rows * columns].reshape(rows, columns, size, size, -1)
        images.append(pixels.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2))
    return images


def separate_packed_patches(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """For Qwen2-VL and similar: the images (3, h, w), from the pixels (S, 3 * frames * p * p) of all S patches.

    A patch has two frames, which are the same in an image. A video becomes several images (frames, 3, h, w), one for
    each step in time, since the tower's attention does not go beyond a step.
    """
    name = "image_grid_thw" if inputs.get("image_grid_thw") is not None else "video_grid_thw"
    grids = torch.as_tensor(inputs[name]).tolist()
    pixels, images = pixels_of(inputs), []
    merge, size = config.spatial_merge_size, config.patch_size
    grid_of_each = [(rows, columns) for times, rows, columns in grids for _ in range(times)]
    lengths = [rows * columns for rows, columns in grid_of_each]
    for patches, (rows, columns) in zip(pixels.reshape(-1, pixels.shape[-1]).split(lengths), grid_of_each, strict=True):
        squares = patches.reshape(
            rows // merge, columns // merge, merge, merge, -1, config.temporal_patch_size, size**2
        )
        squares = squares.unflatten(-1, (size, size))  # (rows and columns of squares, merge, merge, 3, frames, p, p)
        image = squares.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(-1, squares.shape[4], rows * size, columns * size)
        images.append(image[0] if name == "image_grid_thw" else image)
    return images


def pack_patches(config: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `separate_packed_patches`, for images (B, 3, h, w) or (B, frames, 3, h, w) of the same size.

    Returns:
        The pixels (S, 3 * frames * p * p) of all patches, and (1, rows, columns) of each image as a tensor (B, 3).
    """
    merge, size, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    if images.ndim == 4:
        images = images.unsqueeze(1).expand(-1, frames, -1, -1, -1)
    rows, columns = images.shape[-2] // size, images.shape[-1] // size
    squares = images.reshape(
        *images.shape[:3], rows // merge, merge, size, columns // merge, merge, size
    )  # (B, frames, 3, rows of squares, merge, p, columns of squares, merge, p)
    patches = squares.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(images) * rows * columns, -1)
    return patches, torch.tensor([1, rows, columns], device=images.device).expand(len(images), 3)


def merged_order(tower: Any, rows: int, columns: int) -> Tensor:
    """For Qwen2-VL and similar: the indices (N,) of an image's patches in its sequence, row by row.

    The sequence is not in this order, since the patches of a square that is merged later are next to each other.
    """
    merge = tower.config.spatial_merge_size
    places = torch.arange(rows * columns).view(rows // merge, columns // merge, merge, merge)
    return places.transpose(1, 2).flatten()
