"""Makes inputs for models of transformers: images of one size, videos, and what VLMs' processors return for two images.

An image depends on its number only, not on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad

from coverage.registry import image, images, padded_patches

SIDE = 4
"""Pixels along a patch."""
GRIDS = ((4, 8), (4, 4))
"""Rows and columns of patches of images 0 and 1, where a model takes images of several sizes."""


class Inputs(NamedTuple):
    """What a processor would return for some images."""

    arguments: Mapping[str, Any]
    """The arguments of the model, or of a VLM's get_image_features."""
    tower: tuple[Any, ...] = ()
    """The arguments of a VLM's vision tower."""


MakeInputs = Callable[[Sequence[int]], Inputs]
TOKENS = torch.tensor([3, 5, 6, 7, 8, 2])
TWO_TEXTS = {"input_ids": TOKENS.expand(2, -1)}  # two texts, which all images are compared with
TEXT_EACH = {"input_ids": lambda number: TOKENS}  # one text for each image

# Images of one size, and videos ---------------------------------------------------------------------------------------


def inputs(**makers: Any) -> MakeInputs:
    """A function that makes a model's arguments for some images.

    Args:
        makers: {argument: function that makes its value from an image's number}, whose values are stacked; anything
            else than a function is passed to the model as it is.
    """
    return lambda numbers: Inputs(
        {
            name: torch.stack([make(number) for number in numbers]) if callable(make) else make
            for name, make in makers.items()
        }
    )


def grid(rows: int = 4, columns: int = 4, **more: Any) -> MakeInputs:
    """Images of so many rows and columns of patches, and further arguments as in `inputs`."""
    return inputs(pixel_values=lambda number: image(number, rows * SIDE, columns * SIDE), **more)


def video(number: int) -> Tensor:
    """The video of this number, with four frames (4, 3, h, w)."""
    return images(range(4 * number, 4 * number + 4), 4 * SIDE)


def video_frames(numbers: Sequence[int]) -> Inputs:
    """The frames of all videos in a row, (4 * B, 3, h, w)."""
    return Inputs({"pixel_values": torch.cat([video(number) for number in numbers])})


# What the processors of VLMs make of images ---------------------------------------------------------------------------


def _picture(number: int) -> Tensor:
    """The image (3, h, w) of this number, for models that take images of several sizes."""
    return image(number, *(SIDE * size for size in GRIDS[number]))


def _patches(number: int, merge: int = 1) -> Tensor:
    """The image of this number as patches (N, 3, p, p), with the `merge` x `merge` patches that are merged in a row."""
    rows, columns = GRIDS[number]
    pixels = _picture(number).reshape(3, rows // merge, merge, SIDE, columns // merge, merge, SIDE)
    return pixels.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def _grid_thw(numbers: Sequence[int], merge: int = 1) -> Tensor:
    """(1, rows, columns) of each image, as Qwen-VL's processors return them."""
    return torch.tensor([(1, *(size // merge for size in GRIDS[number])) for number in numbers])


def _positional(**features: Any) -> Inputs:
    """Inputs of a model whose tower takes the same arguments as get_image_features, in the same order."""
    return Inputs(features, tuple(features.values()))


def squares(numbers: Sequence[int], tiled: bool = False, **rows: Tensor) -> Inputs:
    """Square images (B, 3, h, w). If `tiled`, each has one tile (B, 1, 3, h, w). `rows` are repeated for each image."""
    pixels = images(numbers, 4 * SIDE)
    extras = {name: row.expand(len(numbers), -1) for name, row in rows.items()}
    return Inputs({"pixel_values": pixels[:, None] if tiled else pixels, **extras}, (pixels,))


def packed(numbers: Sequence[int], merge: int = 2, frames: int = 1, flat: bool = True) -> Inputs:
    """The patches of all images in one sequence (S, 3 * frames * p * p), as Qwen-VL and similar models take them."""
    pixels = torch.cat([_patches(number, merge) for number in numbers])
    if flat:
        pixels = pixels.unsqueeze(2).expand(-1, -1, frames, -1, -1).flatten(1)
    return _positional(pixel_values=pixels, image_grid_thw=_grid_thw(numbers))


qwen = partial(packed, frames=2)


def radio(numbers: Sequence[int]) -> Inputs:
    made = packed(numbers, merge=1).arguments
    return _positional(pixel_values=made["pixel_values"], image_grid_hw=made["image_grid_thw"][:, 1:])


def video_llama(numbers: Sequence[int]) -> Inputs:
    merge_sizes = torch.full((len(numbers),), 2)
    return _positional(**packed(numbers).arguments, image_merge_sizes=merge_sizes)


def paddle(numbers: Sequence[int]) -> Inputs:
    features = packed(numbers, merge=1, flat=False).arguments
    return Inputs(features, (features["pixel_values"][None], features["image_grid_thw"]))


def inkling(numbers: Sequence[int]) -> Inputs:
    """Squares of 2 x 2 patches with channels last; the grid counts squares, not patches."""
    merged = torch.cat([_patches(number, 2) for number in numbers]).unflatten(0, (-1, 2, 2))
    pixels = merged.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    return _positional(pixel_values=pixels, image_grid_thw=_grid_thw(numbers, 2))


def _canvas(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images padded with zeros to squares (B, 3, s, s), and which pixels are no padding (B, s, s)."""
    side = SIDE * max(map(max, GRIDS))
    pictures = [_picture(number) for number in numbers]
    pixels = torch.stack([pad(each, (0, side - each.shape[2], 0, side - each.shape[1])) for each in pictures])
    return pixels, (pixels != 0).any(1)


def idefics(numbers: Sequence[int], mask_name: str = "pixel_attention_mask") -> Inputs:
    """Padded images with a mask. Aria takes one image for each sample, Idefics several, here one."""
    pixels, mask = _canvas(numbers)
    tower = (pixels, mask[:, ::SIDE, ::SIDE].contiguous())
    if mask_name == "pixel_attention_mask":
        pixels, mask = pixels[:, None], mask[:, None]
    return Inputs({"pixel_values": pixels, mask_name: mask}, tower)


def pixtral(numbers: Sequence[int]) -> Inputs:
    """Padded images with their sizes; the tower packs their patches into one sequence."""
    return _positional(pixel_values=_canvas(numbers)[0], image_sizes=_grid_thw(numbers)[:, 1:] * SIDE)


def _padded(numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `registry.padded_patches`, but always padded to the length of image 0."""
    pixels, positions, mask = padded_patches([_picture(number) for number in (*numbers, 0)], SIDE)
    return pixels[:-1], positions[:-1], mask[:-1]


def siglip2(numbers: Sequence[int], **more: Any) -> Inputs:
    pixels, _, mask = _padded(numbers)
    shapes = _grid_thw(numbers)[:, 1:]
    features = {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask.int(), **more}
    return Inputs(features, (pixels, mask.int(), shapes))


def gemma4(numbers: Sequence[int]) -> Inputs:
    pixels, positions, _ = _padded(numbers)
    return _positional(pixel_values=pixels.sigmoid(), image_position_ids=positions.flip(-1))


def flattened(numbers: Sequence[int]) -> Inputs:
    """Patches whose first two values are their row and column, counted from 1."""
    pixels, positions, mask = _padded(numbers)
    return _positional(flattened_patches=torch.cat([positions + 1, pixels], -1), attention_mask=mask.float())


def tiles(numbers: Sequence[int]) -> Inputs:
    """The whole image and two tiles in a row, (B, 3, 3, h, w), as LLaVA-NeXT takes them."""
    pixels = torch.stack([images((number, number + 2, number + 4), 4 * SIDE) for number in numbers])
    sizes = torch.tensor([(4 * SIDE, 8 * SIDE)] * len(numbers))
    return Inputs({"pixel_values": pixels, "image_sizes": sizes}, (pixels.flatten(0, 1),))


def mllama(numbers: Sequence[int]) -> Inputs:
    """Up to four tiles for each image: image 0 has two in a row, image 1 has one."""
    counts = torch.tensor([[2 - number] for number in numbers])
    padded = [pad(images(range(number, 2), 4 * SIDE), (*[0] * 7, 2 + number)) for number in numbers]
    mask = (torch.arange(4) < counts).long()
    return _positional(
        pixel_values=torch.stack(padded)[:, None], aspect_ratio_ids=counts, aspect_ratio_mask=mask[:, None]
    )


def molmo(numbers: Sequence[int]) -> Inputs:
    """Patches (B, N, p * p * 3), and which four patches become each image token."""
    patches, _, _ = padded_patches(images(numbers, 4 * SIDE), SIDE)
    windows = torch.arange(16 * len(numbers)).view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4)
    grids = torch.tensor([(2, 2, 0, 0)] * len(numbers))
    features = {"pixel_values": patches, "image_token_pooling": windows, "image_grids": grids}
    return Inputs(features, (patches,))


def llama4(numbers: Sequence[int]) -> Inputs:
    made = squares(numbers)
    if not transformers.__version__.startswith("4."):
        return made
    unused = {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }  # transformers 4 needs them all the same
    return Inputs({**made.arguments, **unused}, made.tower)
