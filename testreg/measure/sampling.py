"""Observe the attention of a sample of the tokens, in a tenth of the time that all tokens would take.

The sampled tokens are the *queries*; their attention to all tokens is observed. All tokens that are not patches are
sampled, and `NUM_QUERIES` of the patches. The random sample has a fixed seed, so it depends on the number of patches
alone, and is the same in every process and run.

Some towers take *packed images*: the tokens of all images in one sequence, without a batch dimension.

Shapes: B images of T tokens; n queries; D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from testreg.families import Grid, Tower
from testreg.measure.attention_observer import Attention, AttentionObserver

NUM_QUERIES = 64  # how many patches are sampled, at most

OnSample = Callable[[int, Tensor, Tensor, Tensor, Tensor | None], object]
"""A function that is called with five arguments:

1. the index of the block;
2. the attention weights (B, heads, n, T) of the queries to all tokens;
3. the numbers (n,) of the queries among the tokens;
4. the share (n,) of all tokens that each query stands for (they sum to 1);
5. the values (B, heads, T, D) of all tokens, or None if they were not observed.
"""


class SampledAttention(AttentionObserver):
    """Calls `on_sample` with the attention of a sample of the tokens, for each attention in the current block.

    Call `begin` before each block, and `end` after it. Only self-attention between all tokens of an image counts:
    attention outside the blocks, or along the frames of a clip, is left out. Tokens are numbered in the order of
    `Tower.arranged`, even if images are packed in one sequence.

    Args:
        images: the images (B, 3, h, w), or clips (B, frames, 3, h, w), of the forward.
    """

    def __init__(self, tower: Tower, images: Tensor, on_sample: OnSample) -> None:
        super().__init__(self._on_attention)
        self.tower, self.images, self.on_sample = tower, images, on_sample
        self.block: int | None = None
        """The current block."""
        self.collected: list[tuple[Tensor, Tensor | None]] = []
        """The weights and values of the first images, if a tower computes the attention of packed images one by one."""

    @functools.cached_property
    def patches(self) -> slice:
        """Where the patches are among the tokens. It is computed once a block runs: a model that takes no images has
        failed by then."""
        return self.tower.patches(self.images)

    def begin(self, block: int) -> None:
        """Say that the block with this index begins to run."""
        self.block = block

    def end(self) -> None:
        """Say that the block has run."""
        super().end()
        self.block = None

    def _on_attention(self, attention: Attention) -> None:
        if self.block is None or not attention.is_self_attention or attention.num_queries < self.patches.stop:
            return
        if self.tower.family.takes == "packed images":
            self._on_packed_attention(attention, self.block)
        elif attention.num_images == len(self.images):
            queries, share = self._sample(attention.num_queries)
            self.on_sample(self.block, attention.weights(queries), queries, share, attention.values)

    def _on_packed_attention(self, attention: Attention, block: int) -> None:
        """Collect the attention of packed images, whose batch dimension is 1, until all images are there.

        The attention may be that of all images in one sequence, or that of one image after the other.
        """
        num_tokens, order, device = self.patches.stop, self.tower.order(self.images), self.tower.device
        count = len(self.images) if attention.num_tokens >= len(self.images) * num_tokens else 1  # images in it
        length = attention.num_tokens // count  # tokens of an image, with registers that come behind the patches
        place = torch.arange(length, device=device)  # where each token of an image is in its part of the sequence
        if order is not None:
            place = torch.cat([order, place[num_tokens:]])
        queries, share = self._sample(length)
        starts = length * torch.arange(count, device=device).unsqueeze(1)
        weights = attention.weights((starts + place[queries]).flatten())[0]  # (heads, count * n, count * length)
        # Only what an image's queries give to tokens of the same image is kept: (count, heads, n, length).
        weights = weights.unflatten(1, (count, -1)).unflatten(3, (count, -1))
        within_images = weights.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2)
        values = attention.values
        if values is not None:
            values = values[0].unflatten(1, (count, -1)).transpose(0, 1)[:, :, place]
        self.collected.append((within_images[..., place], values))
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
    """Sample queries among the tokens: at most `NUM_QUERIES` of the patches, and all other tokens.

    The patches are the tokens from `first` to `end` (exclusive).

    Returns:
        The numbers (n,) of the queries; the share (n,) of all tokens that each query stands for.
    """
    generator = torch.Generator().manual_seed(0)
    patches = first + torch.randperm(end - first, generator=generator)[:NUM_QUERIES].sort().values
    others = torch.cat([torch.arange(first), torch.arange(end, num_tokens)])
    count = torch.cat([torch.ones(len(others)), torch.full((len(patches),), (end - first) / len(patches))])
    return torch.cat([others, patches]), count / num_tokens


def far_queries(queries: Tensor, grid: Grid, first: int) -> Tensor:
    """Whether a query is far from a patch, (n, N).

    A query is near a patch if it is this patch, or one of those around it (eight, in an image). A query that is no
    patch is far from all patches.

    Args:
        queries: the numbers of the queries among the tokens, (n,).
        grid: the grid of the N patches.
        first: the number of the first patch among the tokens.
    """
    places = torch.cartesian_prod(*(torch.arange(size, device=queries.device) for size in grid))  # (N, 2) or (N, 3)
    number = queries - first
    is_patch = (number >= 0) & (number < len(places))
    apart = (places[number.clamp(0, len(places) - 1)].unsqueeze(1) - places).abs().amax(-1)  # (n, N)
    return (apart > 1) | ~is_patch.unsqueeze(1)
