"""A cache of the inputs of blocks, so that comparing sets of neurons runs fewer blocks.

The search for register neurons patches the model with one set of neurons after the other, and runs the same batches of
images with each. A neuron of the set is *moved*: its activation is placed on registers, the extra tokens. The input of
a block depends only on the neurons that are moved in earlier blocks. So if two sets have the same neurons up to some
block, the blocks up to there are run for the first set only.

While a block runs, figures of its patches (such as their norms) are read off. They are kept with the inputs, since they
could not be read off a block that is not run.
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
from testreg.records.options import Start

Key = tuple[int, tuple[int, Start], frozenset[tuple[int, int]]]
"""What the input of a block depends on: the index of the block, the number of registers and how they start, and the
neurons (block, unit) that are moved in earlier blocks."""


@dataclass(frozen=True)
class CachedInput:
    """The input of a block for one batch, and the figures of the earlier blocks."""

    output: Any
    """The output of the previous block, which is the input of this block, registers included."""
    figures: Tensor
    """K figures of each of N patches in each of the i earlier blocks, (K, i, B, N)."""


class BlockCache:
    """Keeps the inputs of blocks, so that a forward can start at the last block whose input is kept.

    Args:
        memory: how many bytes may be kept for each batch. The least recently used inputs are removed first. Among the
            inputs of one set of neurons, the last blocks' are removed first, since the fewest other sets share them.
    """

    def __init__(self, tower: Tower, memory: int = 0) -> None:
        self.tower, self.memory = tower, memory
        self.cached: dict[int, OrderedDict[Key, CachedInput]] = {}
        """The cached inputs of each batch, by the number of the batch; the most recently used last."""
        self.keys: list[Key] = []
        """The keys of the inputs with the current set of neurons, one for each block."""
        self.first_moved = 0
        """The first block with moved neurons of the current set. Up to it, no input depends on the set; of these
        inputs, only its own is kept."""
        self.batch = 0
        """The number of the current batch."""
        self.first_run = 0
        """The first block that has to be run for the current batch."""
        self.start: CachedInput | None = None
        """The cached input of the block `first_run`; None if that is block 0."""
        self.new_inputs: dict[int, Any] = {}
        """Inputs that the current forward has computed, by the block that takes them."""

    @contextmanager
    def reused(self, neurons: Sequence[Neuron], registers: tuple[int, Start]) -> Iterator[None]:
        """Within the context, the blocks in front of the last one whose input is in the cache are not run.

        The model must be patched with these neurons and registers (their number, and how they start). Call `begin`
        before each forward, and `finish` after it.
        """
        moved = frozenset((block, unit) for block, unit, _ in neurons)
        self.first_moved = min((block for block, _ in moved), default=0)
        self.keys = [
            (block, registers, frozenset(neuron for neuron in moved if neuron[0] < block))
            for block in range(self.tower.depth)
        ]
        blocks = [CachedBlock(block.module, self, index) for index, block in enumerate(self.tower.blocks[:-1])]
        for each in blocks:
            each.install()
        try:
            yield
        finally:
            for each in blocks:
                each.remove()

    def begin(self, batch: int) -> None:
        """Say that a forward of the batch with this number begins."""
        cached = self.cached.setdefault(batch, OrderedDict())
        self.first_run = max((key[0] for key in self.keys if key in cached), default=0)
        self.batch, self.start, self.new_inputs = batch, cached.get(self.keys[self.first_run]), {}

    def finish(self, recorded: Tensor) -> Tensor:
        """Say that the forward has ended; returns the figures (K, L, B, N) of all L blocks.

        Args:
            recorded: the figures (K, L, B, N) that were read off the forward. Those of blocks that were not run are
                wrong, and are replaced by the cached ones.
        """
        figures = recorded if self.start is None else torch.cat([self.start.figures, recorded[:, self.first_run :]], 1)
        cached = self.cached[self.batch]
        for block, output in self.new_inputs.items():
            cached[self.keys[block]] = CachedInput(output, figures[:, :block])
        for key in reversed(self.keys):
            if key in cached:
                cached.move_to_end(key)
        while sum(_bytes(each.output) for each in cached.values()) > self.memory:
            cached.popitem(last=False)
        return figures

    def keep(self, index: int, output: Any) -> None:
        """Keep the output of a block, the input of the next block, if it can be reused and fits into the memory."""
        if index + 1 >= self.first_moved and _bytes(output) * (len(self.new_inputs) + 1) <= self.memory:
            self.new_inputs[index + 1] = _copied(output)


@dataclass(eq=False)
class CachedBlock(Override):
    """Takes the place of a block's forward: the block is run unless the forward starts at a later one."""

    cache: BlockCache
    index: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if cache.start is not None and self.index < cache.first_run:
            output = cache.start.output
            if self.index == cache.first_run - 1:
                return _copied(output)
            # Not the last tokens that are kept: these may have registers, which enter at a later block than this.
            tokens = args[0] if args else next(iter(kwargs.values()))
            return (tokens, *output[1:]) if isinstance(output, tuple) else tokens
        output = self.original(*args, **kwargs)
        cache.keep(self.index, output)
        return output


def _copied(output: Any) -> Any:
    """The output of a block, with its tokens copied, since the next block may change them in place."""
    if isinstance(output, tuple):
        return (_copied(output[0]), *output[1:])
    return output.clone()


def _bytes(output: Any) -> int:
    """The size of a block's output in bytes."""
    tokens: Tensor = output[0] if isinstance(output, tuple) else output
    return tokens.nbytes
