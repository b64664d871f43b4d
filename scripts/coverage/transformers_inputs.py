"""What models of transformers take: images of one size, videos, and what the processors of VLMs make of two images."""

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
    """What a processor makes of some images."""

    arguments: Mapping[str, Any]
    """The arguments of the model, or of a VLM's get_image_features."""
    tower: tuple[Any, ...] = ()
    """The arguments of a VLM's vision tower."""


MakeInputs = Callable[[Sequence[int]], Inputs]
TOKENS = torch.tensor([3, 5, 6, 7, 8, 2])
TWO_TEXTS = {"input_ids": TOKENS.expand(2, -1)}  # that every image is compared with
TEXT_EACH = {"input_ids": lambda number: TOKENS}

# Images of one size, and videos ---------------------------------------------------------------------------------------


def inputs(**makers: Any) -> MakeInputs:
    """By name: what a function makes of the number of each image, stacked; what is no function stays as it is."""
    return lambda numbers: Inputs(
        {
            name: torch.stack([make(number) for number in numbers]) if callable(make) else make
            for name, make in makers.items()
        }
    )


def grid(rows: int = 4, columns: int = 4, **more: Any) -> MakeInputs:
    """Images of so many patches."""
    return inputs(pixel_values=lambda number: image(number, rows * SIDE, columns * SIDE), **more)


def video(number: int) -> Tensor:
    """Four frames (4, 3, h, w)."""
    return images(range(4 * number, 4 * number + 4), 4 * SIDE)


def video_frames(numbers: Sequence[int]) -> Inputs:
    """The frames (4 * B, 3, h, w) of all videos in a row."""
    return Inputs({"pixel_values": torch.cat([video(number) for number in numbers])})


# What the processors of VLMs make of images ---------------------------------------------------------------------------


def _picture(number: int) -> Tensor:
    """The image (3, h, w) of this number, where a model takes images of several sizes."""
    return image(number, *(SIDE * size for size in GRIDS[number]))


def _patches(number: int, merge: int = 1) -> Tensor:
    """Image `number` as patches (N, 3, p, p); those that the model merges, `merge` x `merge` of them, in a row."""
    rows, columns = GRIDS[number]
    pixels = _picture(number).reshape(3, rows // merge, merge, SIDE, columns // merge, merge, SIDE)
    return pixels.permute(1, 4, 2, 5, 0, 3, 6).flatten(0, 3)


def _grid_thw(numbers: Sequence[int], merge: int = 1) -> Tensor:
    return torch.tensor([(1, *(size // merge for size in GRIDS[number])) for number in numbers])


def _positional(**features: Any) -> Inputs:
    """The tower takes what get_image_features takes, in the same order."""
    return Inputs(features, tuple(features.values()))


def squares(numbers: Sequence[int], tiled: bool = False, **rows: Tensor) -> Inputs:
    """Squares (B, 3, h, w); some models take tiles of each image, here a single one, and one of `rows` for each."""
    pixels = images(numbers, 4 * SIDE)
    extras = {name: row.expand(len(numbers), -1) for name, row in rows.items()}
    return Inputs({"pixel_values": pixels[:, None] if tiled else pixels, **extras}, (pixels,))


def packed(numbers: Sequence[int], merge: int = 2, frames: int = 1, flat: bool = True) -> Inputs:
    """The patches of all images in one sequence (S, 3 * frames * p * p), as Qwen-VL and its kin take them."""
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
    """Squares of 2 x 2 patches, channels last; the grid counts the squares."""
    merged = torch.cat([_patches(number, 2) for number in numbers]).unflatten(0, (-1, 2, 2))
    pixels = merged.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2)
    return _positional(pixel_values=pixels, image_grid_thw=_grid_thw(numbers, 2))


def _canvas(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The images (B, 3, s, s), padded with zeros to a square, and which pixels (B, s, s) are theirs."""
    side = SIDE * max(map(max, GRIDS))
    pictures = [_picture(number) for number in numbers]
    pixels = torch.stack([pad(each, (0, side - each.shape[2], 0, side - each.shape[1])) for each in pictures])
    return pixels, (pixels != 0).any(1)


def idefics(numbers: Sequence[int], mask_name: str = "pixel_attention_mask") -> Inputs:
    """Padded images; Aria has one for each sample, Idefics several."""
    pixels, mask = _canvas(numbers)
    tower = (pixels, mask[:, ::SIDE, ::SIDE].contiguous())
    if mask_name == "pixel_attention_mask":
        pixels, mask = pixels[:, None], mask[:, None]
    return Inputs({"pixel_values": pixels, mask_name: mask}, tower)


def pixtral(numbers: Sequence[int]) -> Inputs:
    """Padded images, whose patches the tower packs (1, S, C)."""
    return _positional(pixel_values=_canvas(numbers)[0], image_sizes=_grid_thw(numbers)[:, 1:] * SIDE)


def _padded(numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """As `padded_patches`, to the length of image 0 in every batch."""
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
    """Patches with their row and column, counted from 1, in front."""
    pixels, positions, mask = _padded(numbers)
    return _positional(flattened_patches=torch.cat([positions + 1, pixels], -1), attention_mask=mask.float())


def tiles(numbers: Sequence[int]) -> Inputs:
    """An overview and tiles (B, tiles, 3, h, w) of each image, as LLaVA-NeXT takes them: two tiles in a row."""
    pixels = torch.stack([images((number, number + 2, number + 4), 4 * SIDE) for number in numbers])
    sizes = torch.tensor([(4 * SIDE, 8 * SIDE)] * len(numbers))
    return Inputs({"pixel_values": pixels, "image_sizes": sizes}, (pixels.flatten(0, 1),))


def mllama(numbers: Sequence[int]) -> Inputs:
    """Up to four tiles for each image: image 0 has two in a row, image 1 a single one."""
    counts = torch.tensor([[2 - number] for number in numbers])
    padded = [pad(images(range(number, 2), 4 * SIDE), (*[0] * 7, 2 + number)) for number in numbers]
    mask = (torch.arange(4) < counts).long()
    return _positional(
        pixel_values=torch.stack(padded)[:, None], aspect_ratio_ids=counts, aspect_ratio_mask=mask[:, None]
    )


def molmo(numbers: Sequence[int]) -> Inputs:
    """Patches (B, N, p * p * 3), and the four patches of each image token."""
    patches, _, _ = padded_patches(images(numbers, 4 * SIDE), SIDE)
    windows = torch.arange(16 * len(numbers)).view(-1, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4)
    grids = torch.tensor([(2, 2, 0, 0)] * len(numbers))
    features = {"pixel_values": patches, "image_token_pooling": windows, "image_grids": grids}
    return Inputs(features, (patches,))


def llama4(numbers: Sequence[int]) -> Inputs:
    made = squares(numbers)
    if not transformers.__version__.startswith("4."):
        return made
    unused = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}  # but transformers 4 wants them
    return Inputs({**made.arguments, **unused}, made.tower)
