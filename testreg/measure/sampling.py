"""Attention from a sample of the tokens, which takes a tenth of the time that all tokens would take.

The sample has all tokens that are not patches, and `NUM_QUERIES` of the patches. These are drawn with a fixed seed for
each number of patches, so that every process and run has the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from testreg.families import Grid, Tower
from testreg.measure.attention_observer import Attention, AttentionObserver

NUM_QUERIES = 64


OnSample = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], object]
"""Called with the index of a block, the attention weights (B, heads, n, T) from n sampled tokens to all, the numbers
(n,) of the sampled tokens, the share (n,) of all tokens that each stands for, and the values (B, heads, T, D), or None
where these were not observed."""


class SampledAttention(AttentionObserver):
    """Calls `on_sample` with the attention from a sample of the tokens, for each attention of the current block.

    `begin` and `end` say which block that is. Attention outside the blocks, between the frames of clips, and between
    other tokens is left out. Tokens are numbered as `Tower.arranged` lays them out, even if images are packed in one
    sequence.

    Args:
        images: the images (B, 3, h, w), or clips (B, frames, 3, h, w), of the forward.
    """

    def __init__(self, tower: Tower, images: Tensor, on_sample: OnSample) -> None:
        super().__init__(self._see)
        self.tower, self.images, self.on_sample = tower, images, on_sample
        self.block: int | None = None
        self.collected: list[tuple[Tensor, Tensor | None]] = []
        """Weights and values of packed images whose attention is computed one by one, until all images are there."""

    @functools.cached_property
    def patches(self) -> slice:
        """Where the patches are. It is asked for once a block runs, so that towers which take no images fail before."""
        return self.tower.patches(self.images)

    def begin(self, block: int) -> None:
        """Say that this block begins to run."""
        self.block = block

    def end(self) -> None:
        """Say that the block has run."""
        super().end()
        self.block = None

    def _see(self, attention: Attention) -> None:
        if self.block is None or not attention.is_of_tokens_to_themselves or attention.num_queries < self.patches.stop:
            return
        if self.tower.family.takes == "packed images":
            self._see_packed(attention, self.block)
        elif attention.num_images == len(self.images):
            queries, share = self._sample(attention.num_queries)
            self.on_sample(self.block, attention.weights(queries), queries, share, attention.values)

    def _see_packed(self, attention: Attention, block: int) -> None:
        """Collect attention (1, heads, T, T) of packed images: of all in one sequence, or of one after the other."""
        number, order, device = self.patches.stop, self.tower.order(self.images), self.tower.device
        count = len(self.images) if attention.num_tokens >= len(self.images) * number else 1
        length = attention.num_tokens // count
        place = torch.arange(length, device=device)  # where an image's tokens are in its part of the sequence
        if order is not None:
            place = torch.cat([order, place[number:]])
        queries, share = self._sample(length)
        starts = length * torch.arange(count, device=device).unsqueeze(1)
        weights = attention.weights((starts + place[queries]).flatten())[0]  # (heads, count * n, count * T)
        own = weights.unflatten(1, (count, -1)).unflatten(3, (count, -1)).diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        values = attention.values
        if values is not None:
            values = values[0].unflatten(1, (count, -1)).transpose(0, 1)[:, :, place]
        self.collected.append((own[..., place], values))
        if sum(len(each) for each, _ in self.collected) == len(self.images):
            all_weights, all_values = zip(*self.collected, strict=True)
            self.collected = []
            self.on_sample(
                block, torch.cat(all_weights), queries, share, None if values is None else torch.cat(all_values)
            )

    def _sample(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        queries, share = sample(num_tokens, self.patches.start, self.patches.stop)
        return queries.to(self.tower.device), share.to(self.tower.device)


@functools.lru_cache
def sample(num_tokens: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Sample tokens: returns their numbers (n,), and the share (n,) of all tokens that each stands for.

    The patches are the tokens from `first` to `end`. At most `NUM_QUERIES` of them are taken, and all other tokens.
    """
    generator = torch.Generator().manual_seed(0)
    patches = first + torch.randperm(end - first, generator=generator)[:NUM_QUERIES].sort().values
    others = torch.cat([torch.arange(first), torch.arange(end, num_tokens)])
    count = torch.cat([torch.ones(len(others)), torch.full((len(patches),), (end - first) / len(patches))])
    return torch.cat([others, patches]), count / num_tokens


def far_queries(queries: Tensor, grid: Grid, first: int) -> Tensor:
    """Which queries are far from which patches, as a mask (n, N).

    A query is far from a patch unless it is that patch or next to it (eight are, in an image). Queries that are not
    patches are far from all.

    Args:
        queries: the numbers of the queries among the tokens, (n,).
        grid: the grid of the N patches, the first of which has the number `first`.
    """
    places = torch.cartesian_prod(*(torch.arange(size, device=queries.device) for size in grid))  # (N, 2) or (N, 3)
    number = queries - first
    is_patch = (number >= 0) & (number < len(places))
    apart = (places[number.clamp(0, len(places) - 1)].unsqueeze(1) - places).abs().amax(-1)  # (n, N)
    return (apart > 1) | ~is_patch.unsqueeze(1)
