"""Vision-language models of transformers: the decoder's blocks, and where an image is among the tokens of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from testreg.families.find import find_tower

_WHOLE_IMAGE_FIRST = ("llava_next", "llava_onevision")  # here the whole image comes first, then its tiles


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the language model (decoder) in a vision-language model of transformers.

    Raises:
        ValueError: the model is not such a model.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    blocks = getattr(decoder, "layers", None)
    if blocks is None or not hasattr(model.config, "vision_config"):
        raise ValueError(f"{type(model).__name__} is no vision-language model of transformers with a decoder")
    return list(blocks)


def image_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, tuple[int, int]]:
    """The indices (B, h*w) of an image's h x w tokens among the tokens of its prompt, row by row; and (h, w).

    Args:
        inputs: what the model's processor returns for a batch of prompts with one image each.

    Raises:
        ValueError: a prompt has no image or several, or it is not known how the image's tokens form a grid.
    """
    config: Any = model.config
    image_token = getattr(config, "image_token_id", None)
    image_token = getattr(config, "image_token_index", None) if image_token is None else image_token
    if image_token is None or "input_ids" not in inputs:
        raise ValueError("the inputs need input_ids, with the image tokens that the model's processor writes")
    is_image = inputs["input_ids"] == image_token  # (B, T)
    counts = is_image.sum(1)
    if (counts != counts[0]).any() or not counts[0]:
        raise ValueError(f"each prompt needs one image, all of one size: these have {counts.tolist()} image tokens")
    positions = is_image.nonzero()[:, 1].view(len(is_image), -1)
    first, (rows, columns) = _grid(model, inputs, int(counts[0]))
    return positions[:, first : first + rows * columns], (rows, columns)


def _grid(model: nn.Module, inputs: Mapping[str, Any], count: int) -> tuple[int, tuple[int, int]]:
    """How many of an image's `count` tokens come before those of its grid, and the grid's rows and columns."""
    config: Any = model.config
    if (sizes := inputs.get("image_grid_thw")) is not None:
        frames, rows, columns = (int(each) for each in sizes[0])
        merged = config.vision_config.spatial_merge_size
        grid = rows // merged, columns // merged
        if len(sizes) == len(inputs["input_ids"]) and (sizes == sizes[0]).all() and frames * grid[0] * grid[1] == count:
            return 0, grid
        raise ValueError(f"each prompt needs one image, all of the same size: image_grid_thw is {sizes.tolist()}")
    pixels = inputs.get("pixel_values")
    if pixels is None:
        raise ValueError("the inputs have neither pixel_values nor image_grid_thw: pass what the processor returns")
    tower = find_tower(model)
    grid = tower.rows_and_columns(pixels)
    size = grid[0] * grid[1]
    one_image_each = len(pixels) == len(inputs["input_ids"])
    if one_image_each and pixels.ndim == 5 and config.model_type in _WHOLE_IMAGE_FIRST and count >= size:
        return 0, grid
    if one_image_each and pixels.ndim == 4:
        for prefix in (0, tower.num_prefix):  # some models pass the tower's prefix tokens to the decoder
            if count == size + prefix:
                return prefix, grid
    raise ValueError(
        f"it is not known how the {count} image tokens of {type(model).__name__} form a grid: {grid[0]} x {grid[1]} "
        "patches of one image would"
    )
