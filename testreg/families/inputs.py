"""What image and video processors of transformers return, as the images or clips that it is of, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PIXELS = ("pixel_values", "pixel_values_videos")  # under these a processor returns them


def pixels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The pixels that a processor returns, as one tensor.

    Raises:
        ValueError: they are images of several sizes, which the processor could not stack.
    """
    pixels = next(inputs[name] for name in PIXELS if inputs.get(name) is not None)
    if isinstance(pixels, list | tuple):
        shapes = {tuple(torch.as_tensor(each).shape) for each in pixels}
        if len(shapes) > 1:
            raise ValueError(f"a processor returned pixels of several shapes ({shapes}): pass them one at a time")
        return torch.stack([torch.as_tensor(each) for each in pixels])
    return torch.as_tensor(pixels)


def separate_images(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Images (3, h, w), of a batch (B, 3, h, w) or of the tiles (B, tiles, 3, h, w) of each picture.

    A tile is an image of its own for the tower. Tiles of zeros fill up pictures that have fewer than others, and are
    left out. What `pixel_attention_mask` hides is cut off.
    """
    pixels = pixels_of(inputs)
    images = pixels.reshape(-1, *pixels.shape[-3:])
    mask = inputs.get("pixel_attention_mask")
    if mask is None:
        return [image for image in images if pixels.ndim == 4 or image.any()]
    shown = torch.as_tensor(mask).bool().reshape(-1, *pixels.shape[-2:])  # (n, h, w)
    return [
        image[:, : int(seen.any(1).sum()), : int(seen.any(0).sum())]
        for image, seen in zip(images, shown, strict=True)
        if seen.any()
    ]


def separate_clips(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Clips (frames, 3, h, w), of a batch (B, frames, 3, h, w), of one clip, or of the frames of several in a row."""
    pixels = pixels_of(inputs)
    return list(pixels.reshape(-1, config.num_frames, *pixels.shape[-3:]))


def separate_sizes(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Pixtral's images (3, h, w), of a batch that was padded to one size."""
    pixels, sizes = pixels_of(inputs), torch.as_tensor(inputs["image_sizes"]).tolist()
    return [image[:, :height, :width] for image, (height, width) in zip(pixels, sizes, strict=True)]


def separate_padded_patches(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """SigLIP 2's images (3, h, w), of the pixels of their patches (B, N, p * p * 3), padded to one number."""
    size, images = config.patch_size, []
    for patches, shape in zip(pixels_of(inputs), torch.as_tensor(inputs["spatial_shapes"]).tolist(), strict=True):
        rows, columns = shape
        pixels = patches[: rows * columns].reshape(rows, columns, size, size, -1)
        images.append(pixels.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2))
    return images


def separate_packed_patches(config: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The images (3, h, w) of Qwen2-VL and its kin, of the pixels (S, 3 * frames * p * p) of all their patches.

    The frames of a still image are the same. Of a video, what is seen at one time is an image (frames, 3, h, w) of its
    own, since the tower attends within it alone.
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
        squares = squares.unflatten(-1, (size, size))  # (h, w, merge, merge, 3, frames, p, p)
        image = squares.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(-1, squares.shape[4], rows * size, columns * size)
        images.append(image[0] if name == "image_grid_thw" else image)
    return images


def pack_patches(config: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `separate_packed_patches` for images (B, 3, h, w) or (B, frames, 3, h, w): their patches, and rows
    and columns (B, 3) of these."""
    merge, size, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
    if images.ndim == 4:
        images = images.unsqueeze(1).expand(-1, frames, -1, -1, -1)
    rows, columns = images.shape[-2] // size, images.shape[-1] // size
    squares = images.reshape(
        *images.shape[:3], rows // merge, merge, size, columns // merge, merge, size
    )  # (B, frames, 3, h, merge, p, w, merge, p)
    patches = squares.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(len(images) * rows * columns, -1)
    return patches, torch.tensor([1, rows, columns], device=images.device).expand(len(images), 3)


def merged_order(tower: Any, rows: int, columns: int) -> Tensor:
    """Where, in the sequence of Qwen2-VL and its kin, the patches of an image are, row by row: those that are merged
    lie together."""
    merge = tower.config.spatial_merge_size
    places = torch.arange(rows * columns).view(rows // merge, columns // merge, merge, merge)
    return places.transpose(1, 2).flatten()
