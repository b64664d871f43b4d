"""Attention of some tokens, which stand for all: a tenth of the time that all would take.

All tokens are taken that are no patches, and `NUM_QUERIES` of the patches. These are drawn once for each number of
patches, so that every process and run has the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.measure.attention_observer import Attention, AttentionObserver

NUM_QUERIES = 64


class SampledAttention(AttentionObserver):
    """Calls `see` with what some tokens of each image give to all, in each attention of the block that runs.

    It is told by `begin` and `end` which block that is. Attention outside of the blocks, of packed images, and of other
    tokens is left out.

    Args:
        images: (B, 3, h, w), those that run.
        see_sample: called with the block, the weights (B, heads, n, T), the numbers (n,) of the tokens that they are
            of, how many each stands for (n,), and the values (B, heads, T, D), or None where these were not seen.
    """

    def __init__(
        self,
        tower: Tower,
        images: Tensor,
        see_sample: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], object],
    ) -> None:
        super().__init__(self._see)
        self.tower, self.images, self.see_sample = tower, images, see_sample
        self.block: int | None = None

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
        block, num_tokens = self.block, attention.num_tokens
        if block is None or not attention.is_of_tokens_to_themselves or num_tokens < self.patches.stop:
            return
        if attention.num_images != len(self.images):
            return
        queries, share = sample(num_tokens, self.patches.start, self.patches.stop)
        device = self.tower.device
        queries, share = queries.to(device), share.to(device)
        self.see_sample(block, attention.weights(queries), queries, share, attention.values)


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


def from_afar(queries: Tensor, grid: tuple[int, int], first: int) -> Tensor:
    """Which queries, by their numbers (n,), are far from which patches (n, N): neither that patch nor one of the eight
    around it. The patches are those from `first`, in a grid; what is no patch is far from all."""
    rows, columns = grid
    patches = torch.arange(rows * columns, device=queries.device)
    number = (queries - first).unsqueeze(1)
    apart = torch.maximum(
        (number.div(columns, rounding_mode="floor") - patches.div(columns, rounding_mode="floor")).abs(),
        (number % columns - patches % columns).abs(),
    )
    return (apart > 1) | (number < 0) | (number >= len(patches))
