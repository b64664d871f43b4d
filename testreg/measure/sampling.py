"""Attention of some tokens, which stand for all: a tenth of the time that all would take.

All tokens are taken that are no patches, and `NUM_QUERIES` of the patches. These are drawn once for each number of
patches, so that every process and run has the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from testreg.families import Grid, Tower
from testreg.measure.attention_observer import Attention, AttentionObserver

NUM_QUERIES = 64


See = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], object]
"""Called with a block, the weights (B, heads, n, T) that some tokens give to all in it, the numbers (n,) of those
tokens, how many each stands for (n,), and the values (B, heads, T, D), or None where these were not seen."""


class SampledAttention(AttentionObserver):
    """Tells what some tokens of each image give to all, in each attention of the block that runs.

    It is told by `begin` and `end` which block that is. Attention outside of the blocks, of the frames of clips, and of
    other tokens is left out. Tokens are numbered as `Tower.arranged` lays them out, also where images are packed in one
    sequence.

    Args:
        images: (B, 3, h, w), or clips (B, frames, 3, h, w), those that run.
    """

    def __init__(self, tower: Tower, images: Tensor, see_sample: See) -> None:
        super().__init__(self._see)
        self.tower, self.images, self.see_sample = tower, images, see_sample
        self.block: int | None = None
        self.before: list[tuple[Tensor, Tensor | None]] = []
        """Weights and values of packed images whose attention is computed one by one, until that of all is there."""

    @functools.cached_property
    def patches(self) -> slice:
        """Where the patches are. It is not asked for before a block runs: towers which take no images say so first."""
        return self.tower.patches(self.images)

    def begin(self, block: int) -> None:
        """This block begins to run."""
        self.block = block

    def end(self) -> None:
        """The block has run."""
        super().end()
        self.block = None

    def _see(self, attention: Attention) -> None:
        if self.block is None or not attention.is_of_tokens_to_themselves or attention.num_queries < self.patches.stop:
            return
        if self.tower.family.takes == "packed images":
            self._see_packed(attention, self.block)
        elif attention.num_images == len(self.images):
            queries, share = self._sample(attention.num_queries)
            self.see_sample(self.block, attention.weights(queries), queries, share, attention.values)

    def _see_packed(self, attention: Attention, block: int) -> None:
        """Attention (1, heads, T, T) of all images in one sequence, or of one after the other."""
        number, order, device = self.patches.stop, self.tower.order(self.images), self.tower.device
        count = len(self.images) if attention.num_tokens >= len(self.images) * number else 1
        length = attention.num_tokens // count
        place = torch.arange(length, device=device)  # where the tokens of an image are in its part of the sequence
        if order is not None:
            place = torch.cat([order, place[number:]])
        queries, share = self._sample(length)
        starts = length * torch.arange(count, device=device).unsqueeze(1)
        weights = attention.weights((starts + place[queries]).flatten())[0]  # (heads, count * n, count * T)
        own = weights.unflatten(1, (count, -1)).unflatten(3, (count, -1)).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        values = attention.values
        if values is not None:
            values = values[0].unflatten(1, (count, -1)).transpose(0, 1)[:, :, place]
        self.before.append((own[..., place], values))
        if sum(len(each) for each, _ in self.before) == len(self.images):
            all_weights, all_values = zip(*self.before, strict=True)
            self.before = []
            self.see_sample(
                block, torch.cat(all_weights), queries, share, None if values is None else torch.cat(all_values)
            )

    def _sample(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        queries, share = sample(num_tokens, self.patches.start, self.patches.stop)
        return queries.to(self.tower.device), share.to(self.tower.device)


@functools.lru_cache
def sample(num_tokens: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Numbers of some tokens (n,), and how many each stands for, as a share of all.

    They are all but the patches, which are those from `first` to `end`, and at most `NUM_QUERIES` of these, drawn by a
    seed.
    """
    generator = torch.Generator().manual_seed(0)
    patches = first + torch.randperm(end - first, generator=generator)[:NUM_QUERIES].sort().values
    others = torch.cat([torch.arange(first), torch.arange(end, num_tokens)])
    count = torch.cat([torch.ones(len(others)), torch.full((len(patches),), (end - first) / len(patches))])
    return torch.cat([others, patches]), count / num_tokens


def from_afar(queries: Tensor, grid: Grid, first: int) -> Tensor:
    """Which queries, by their numbers (n,), are far from which patches (n, N): neither that patch nor one of those
    around it, eight in an image. The patches are those from `first`, in a grid; what is no patch is far from all."""
    places = torch.cartesian_prod(*(torch.arange(size, device=queries.device) for size in grid))  # (N, 2) or (N, 3)
    number = queries - first
    is_patch = (number >= 0) & (number < len(places))
    apart = (places[number.clamp(0, len(places) - 1)].unsqueeze(1) - places).abs().amax(-1)  # (n, N)
    return (apart > 1) | ~is_patch.unsqueeze(1)
