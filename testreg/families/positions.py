"""The learned position embeddings of a tower's patches, as they lie in the grid that they were made for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from testreg.families.find import find_part
from testreg.families.tower import Tower


@dataclass(frozen=True)
class PositionEmbedding:
    """A parameter (..., C) whose last rows are the position embeddings of a grid of patches, row by row.

    A tower that is given images of another size interpolates these.
    """

    parameter: nn.Parameter
    grid: tuple[int, int]
    """Rows and columns of patches."""

    @property
    def patches(self) -> Tensor:
        """The embeddings of the patches, (N, C)."""
        rows, columns = self.grid
        return self.parameter.detach().flatten(0, -2)[-rows * columns :]

    @torch.no_grad()
    def replace(self, numbers: Tensor, embeddings: Tensor) -> None:
        """Put embeddings (n, C) in place of those of the patches of these numbers (n,)."""
        every = self.parameter.detach().flatten(0, -2).clone()
        rows, columns = self.grid
        every[len(every) - rows * columns + numbers.to(every.device)] = embeddings.to(every)
        self.parameter.copy_(every.view(self.parameter.shape))


def position_embedding(tower: Tower) -> PositionEmbedding | None:
    """The position embeddings of a tower; None if it has none (rotary ones, say), or none that can be read as a grid:
    its row does not say where, they are of clips, sharded, quantised, or on the meta device."""
    part = find_part(tower.module, tower.family.positions)
    parameter = part.weight if isinstance(part, nn.Embedding) else part
    # Of a clip, the positions are in time too.
    if type(parameter) is not nn.Parameter or parameter.is_meta or isinstance(tower.embedding, nn.Conv3d):
        return None
    if parameter.shape[-1] != tower.width or not parameter.is_floating_point():
        return None
    if parameter.ndim == 4:
        return PositionEmbedding(parameter, (parameter.shape[1], parameter.shape[2]))
    count = parameter.shape[:-1].numel()
    # Some towers have embeddings for prefix tokens too, or for a few of these; they come first.
    for rows, columns in _grids(tower, count):
        if 0 <= count - rows * columns <= tower.num_prefix:
            return PositionEmbedding(parameter, (rows, columns))
    return None


def _grids(tower: Tower, count: int) -> Iterator[tuple[int, int]]:
    """What the grid may be: that of images of the size that the tower says, or a square of `count` positions."""
    for path in ("config.image_size", "patch_embed.img_size", "image_size", "input_resolution"):
        size = find_part(tower.module, path)
        height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
        if isinstance(height, int) and isinstance(width, int):
            with suppress(ValueError):  # its row does not say how large a patch is
                yield tower.rows_and_columns(torch.empty(height, width, device="meta"))
    side = int(count**0.5)
    yield side, side
