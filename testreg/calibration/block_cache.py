"""A cache of the tokens between the blocks of a patched tower.

The input of a block depends only on the neurons that are moved in earlier blocks. So where several sets of neurons have
these in common, the earlier blocks are run for the first set alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.neurons import Neuron
from testreg.patching.override import Override
from testreg.records.record import Start

Key = tuple[int, tuple[int, Start], frozenset[tuple[int, int]]]
"""What the input of a block depends on: the block, the number of registers, what they hold at
first, and the neurons moved in earlier blocks."""


@dataclass(frozen=True)
class Kept:
    """The input of a block for one batch, and the figures of the blocks before it."""

    output: Any
    """The output of the block before, registers included."""
    figures: Tensor
    """The figures of the patches after each of the earlier blocks, (K, depth, B, N) for K figures."""


class BlockCache:
    """Keeps the inputs of blocks, so that a forward can begin at the last block whose input is kept.

    Args:
        memory: bytes that may be kept of each batch. The least recently used inputs go first, and of one set of neurons
            those of its last blocks, which the fewest other sets share.
    """

    def __init__(self, tower: Tower, memory: int = 0) -> None:
        self.tower, self.memory = tower, memory
        self.kept: dict[int, OrderedDict[Key, Kept]] = {}
        """What is kept of each batch, by its number; the most recently used last."""
        self.keys: list[Key] = []
        """The keys of the current set of neurons, one for each block."""
        self.first_moved = 0
        """The first block with moved neurons. Inputs of earlier blocks are not kept, since its own is."""
        self.batch = 0
        """The number of the current batch."""
        self.first_run = 0
        """The first block that has to be run for it."""
        self.start: Kept | None = None
        """What is kept for that block; None if it is block 0."""
        self.made: dict[int, Any] = {}
        """Inputs that the current forward has computed, by block."""

    @contextmanager
    def reused(self, neurons: Sequence[Neuron], registers: tuple[int, Start]) -> Iterator[None]:
        """Within the context, blocks whose output is kept are not run.

        The model must be patched with these neurons, and with this number of registers that start like this.

        Call `begin` before each forward and `finish` after it.
        """
        moved = frozenset((block, unit) for block, unit, _ in neurons)
        depths = range(self.tower.depth)
        self.first_moved = min((block for block, _ in moved), default=0)
        self.keys = [(depth, registers, frozenset(neuron for neuron in moved if neuron[0] < depth)) for depth in depths]
        blocks = [CachedBlock(block.module, self, index) for index, block in enumerate(self.tower.blocks[:-1])]
        for each in blocks:
            each.install()
        try:
            yield
        finally:
            for each in blocks:
                each.remove()

    def begin(self, batch: int) -> None:
        """Start the forward of a batch, by its number."""
        kept = self.kept.setdefault(batch, OrderedDict())
        self.first_run = max((key[0] for key in self.keys if key in kept), default=0)
        self.batch, self.start, self.made = batch, kept.get(self.keys[self.first_run]), {}

    def finish(self, recorded: Tensor) -> Tensor:
        """End the forward; returns the figures (K, L, B, N) of all blocks.

        `recorded` are those that the forward gave; of blocks that were not run, the kept ones take their place.
        """
        figures = recorded if self.start is None else torch.cat([self.start.figures, recorded[:, self.first_run :]], 1)
        kept = self.kept[self.batch]
        kept |= {self.keys[index]: Kept(output, figures[:, :index]) for index, output in self.made.items()}
        for key in reversed(self.keys):
            if key in kept:
                kept.move_to_end(key)
        while sum(_bytes(each.output) for each in kept.values()) > self.memory:
            kept.popitem(last=False)
        return figures

    def keep(self, index: int, output: Any) -> None:
        """Keep the output of a block, the input of the next, if it can be of use and fits into the memory."""
        if index + 1 >= self.first_moved and _bytes(output) * (len(self.made) + 1) <= self.memory:
            self.made[index + 1] = _copied(output)


@dataclass(eq=False)
class CachedBlock(Override):
    """A block that is run only if its output is not kept."""

    cache: BlockCache
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if cache.start is not None and self.index < cache.first_run:
            return _copied(cache.start.output)
        output = self.original(*args, **kwargs)
        cache.keep(self.index, output)
        return output


def _copied(output: Any) -> Any:
    """The output of a block with a copy of its tokens, since the next block may edit them in place."""
    if isinstance(output, tuple):
        return (_copied(output[0]), *output[1:])
    return output.clone()


def _bytes(output: Any) -> int:
    """The size of a block's tokens."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens.nbytes
