"""The blocks in front of all moved neurons: what they give is the same whatever is moved, so it is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.patching.override import Override


class Prefix:
    """Keeps what the first blocks of a patched tower give for each batch, registers included; later forwards of the
    batch get it from there."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.depth = 0
        """The number of blocks whose output is kept."""
        self.batch = 0
        """The number of the batch that runs."""
        self.outputs: dict[int, Any] = {}
        """What the last of these blocks gave, by the number of the batch."""
        self.norms: dict[int, Tensor] = {}
        """Norms (depth, B, T) after these blocks, by the number of the batch."""

    @contextmanager
    def reused(self, depth: int) -> Iterator[None]:
        """Within the context, the first blocks are not run again for batches that have passed them.

        The model is patched within it, with neurons that lie behind the first `depth` blocks.
        """
        if not 0 < self.depth <= depth:  # what was kept has neurons in it, or there is nothing yet
            self.depth = depth
            self.outputs.clear()
            self.norms.clear()
        kept = [KeptBlock(block.module, self, index) for index, block in enumerate(self.tower.blocks[: self.depth])]
        for each in kept:
            each.install()
        try:
            yield
        finally:
            for each in kept:
                each.remove()

    def norms_of(self, recorded: Tensor) -> Tensor:
        """Norms (L, B, T) of the running batch, after blocks that were not run again those of its first forward."""
        if not self.depth:
            return recorded
        first = self.norms.setdefault(self.batch, recorded[: self.depth])
        return torch.cat([first, recorded[self.depth :]])


@dataclass(eq=False)
class KeptBlock(Override):
    """One of the first blocks: it runs at the first forward of a batch, and then hands on what all of them made."""

    prefix: Prefix
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (kept := self.prefix.outputs.get(self.prefix.batch)) is not None:
            return _copied(kept)
        out = self.original(*args, **kwargs)
        if self.index == self.prefix.depth - 1:
            self.prefix.outputs[self.prefix.batch] = _copied(out)
        return out


def _copied(output: Any) -> Any:
    """The output of a block, with tokens of its own: the next block may edit them."""
    if isinstance(output, tuple):
        return (_copied(output[0]), *output[1:])
    return output.clone()
