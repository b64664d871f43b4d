"""What a block of a patched tower gets depends on the neurons that are moved in front of it. So of sets of neurons that
have these in common, only the first is run through the blocks before."""

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

Key = tuple[int, int, frozenset[tuple[int, int]]]
"""A block, the number of registers, and the neurons that are moved in front of the block."""


@dataclass(frozen=True)
class Kept:
    """What the blocks in front of another made of a batch."""

    output: Any
    """That of the last of them, registers included."""
    figures: Tensor
    """What was read off the patches after each of them, (K, depth, B, N) for K figures."""


class BlockCache:
    """Keeps what blocks of a patched tower get in each batch: a later forward begins at the last block whose input is
    known.

    Args:
        memory: bytes that may be kept of each batch. The inputs of the latest sets stay, and of one set those of its
            first blocks, which most of the others share.
    """

    def __init__(self, tower: Tower, memory: int = 0) -> None:
        self.tower, self.memory = tower, memory
        self.kept: dict[int, OrderedDict[Key, Kept]] = {}
        """By the number of the batch; the latest last."""
        self.keys: list[Key] = []
        """Those of the running set, by block."""
        self.first_moved = 0
        """Its first block with moved neurons; what the blocks before get is of no use, once that is known."""
        self.batch = 0
        """The number of the batch that runs."""
        self.first_run = 0
        """The first block that runs."""
        self.start: Kept | None = None
        """What the blocks before it have made of the batch."""
        self.made: dict[int, Any] = {}
        """The inputs of blocks that the running forward has made, by their numbers."""

    @contextmanager
    def reused(self, neurons: Sequence[Neuron], num_registers: int) -> Iterator[None]:
        """Within the context, in which the model is patched with these neurons, blocks are not run whose output is
        known. Each forward is between `begin` and `finish`."""
        moved = frozenset((block, unit) for block, unit, _ in neurons)
        depths = range(self.tower.depth)
        self.first_moved = min((block for block, _ in moved), default=0)
        self.keys = [
            (depth, num_registers, frozenset(neuron for neuron in moved if neuron[0] < depth)) for depth in depths
        ]
        blocks = [KeptBlock(block.module, self, index) for index, block in enumerate(self.tower.blocks[:-1])]
        for each in blocks:
            each.install()
        try:
            yield
        finally:
            for each in blocks:
                each.remove()

    def begin(self, batch: int) -> None:
        """The next forward is of this batch."""
        kept = self.kept.setdefault(batch, OrderedDict())
        self.first_run = max((key[0] for key in self.keys if key in kept), default=0)
        self.batch, self.start, self.made = batch, kept.get(self.keys[self.first_run]), {}

    def finish(self, recorded: Tensor) -> Tensor:
        """Figures (K, L, B, N) of the batch, also of blocks that did not run, from those that its forward recorded."""
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
        """Keep what a block of the running forward gives to the next, if that may be of use, and there is room."""
        if index + 1 >= self.first_moved and _bytes(output) * (len(self.made) + 1) <= self.memory:
            self.made[index + 1] = _copied(output)


@dataclass(eq=False)
class KeptBlock(Override):
    """A block that is run only if its output is not known."""

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
    """The output of a block, with tokens of its own: the next block may edit them."""
    if isinstance(output, tuple):
        return (_copied(output[0]), *output[1:])
    return output.clone()


def _bytes(output: Any) -> int:
    """The size of a block's tokens."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens.nbytes
