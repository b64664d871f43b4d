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

MAX_KEPT = 8  # inputs of blocks, of each batch

Key = tuple[int, frozenset[tuple[int, int]]]
"""A block, and the neurons that are moved in front of it."""


@dataclass(frozen=True)
class Kept:
    """What the blocks in front of another made of a batch."""

    output: Any
    """That of the last of them, registers included."""
    norms: Tensor
    """Norms (depth, B, N) of the patches after each of them."""


class Prefix:
    """Keeps what blocks of a patched tower get in each batch: a later forward begins at the last block whose input is
    known.

    That is kept of blocks with moved neurons, where the next set may differ: of at most `MAX_KEPT`. Those of the latest
    sets stay, and of one set those of its first blocks, which most of the others share.
    """

    def __init__(self, tower: Tower) -> None:
        self.tower = tower
        self.kept: dict[int, OrderedDict[Key, Kept]] = {}
        """By the number of the batch; the latest last."""
        self.keys: list[Key] = []
        """Those of the running set, by block."""
        self.batch = 0
        """The number of the batch that runs."""
        self.first = 0
        """The first block that runs."""
        self.start: Kept | None = None
        """What the blocks before it have made of the batch."""
        self.made: dict[int, Any] = {}
        """What the running forward has made for blocks with moved neurons, by their numbers."""

    @contextmanager
    def reused(self, neurons: Sequence[Neuron]) -> Iterator[None]:
        """Within the context, in which the model is patched with these neurons, blocks are not run whose output is
        known. Each forward is between `begin` and `finish`."""
        moved = frozenset((block, unit) for block, unit, _ in neurons)
        depths = range(self.tower.depth)
        self.keys = [(depth, frozenset(neuron for neuron in moved if neuron[0] < depth)) for depth in depths]
        blocks = {block for block, _ in moved}
        kept = [KeptBlock(self.tower.blocks[i].module, self, i, i + 1 in blocks) for i in depths[:-1]]
        for each in kept:
            each.install()
        try:
            yield
        finally:
            for each in kept:
                each.remove()

    def begin(self, batch: int) -> None:
        """The next forward is of this batch."""
        kept = self.kept.setdefault(batch, OrderedDict())
        self.first = max((key[0] for key in self.keys if key in kept), default=0)
        self.batch, self.start, self.made = batch, kept.get(self.keys[self.first]), {}

    def finish(self, recorded: Tensor) -> Tensor:
        """Norms (L, B, N) of the batch, also after blocks that did not run, from those that its forward recorded."""
        norms = recorded if self.start is None else torch.cat([self.start.norms, recorded[self.first :]])
        kept = self.kept[self.batch]
        kept |= {self.keys[index]: Kept(output, norms[:index]) for index, output in self.made.items()}
        for key in reversed(self.keys):
            if key in kept:
                kept.move_to_end(key)
        while len(kept) > MAX_KEPT:
            kept.popitem(last=False)
        return norms


@dataclass(eq=False)
class KeptBlock(Override):
    """A block that is run only if its output is not known."""

    prefix: Prefix
    index: int
    is_kept: bool
    """Whether its output is kept: neurons are moved in the next block."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prefix = self.prefix
        if prefix.start is not None and self.index < prefix.first:
            return _copied(prefix.start.output)
        out = self.original(*args, **kwargs)
        if self.is_kept and len(prefix.made) < MAX_KEPT:
            prefix.made[self.index + 1] = _copied(out)
        return out


def _copied(output: Any) -> Any:
    """The output of a block, with tokens of its own: the next block may edit them."""
    if isinstance(output, tuple):
        return (_copied(output[0]), *output[1:])
    return output.clone()
