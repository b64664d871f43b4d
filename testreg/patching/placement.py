"""Which methods of a tower are replaced, and by what."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from testreg.families import Block, Tower
from testreg.patching.attention import AttentionWeights, PositionBias
from testreg.patching.block import RegisterBlock
from testreg.patching.layout import Layout
from testreg.patching.override import Constant, Override
from testreg.patching.shift import ShiftBefore
from testreg.patching.state import Patch
from testreg.patching.static import static_parts


def overrides(tower: Tower, patch: Patch, shift: Callable[..., Tensor]) -> Iterator[Override | Constant]:
    """`shift` in front of every fc2 with register neurons, and what lets registers ride through each block."""
    layout = Layout(patch.num_registers, tower.sequence_first)
    units = patch.neurons.by_block()
    blocks = {block.module for block in tower.blocks}
    holders = frozenset(type(each) for each in tower.module.modules() if blocks <= set(each.modules()))
    if patch.static is not None:
        yield from static_parts(tower, patch, patch.static)
    for i, block in enumerate(tower.blocks):
        shifts = tuple(_shifts(block, i, units.get(i, []), patch, layout, shift))
        yield from shifts
        yield RegisterBlock(block.module, patch, layout, tower, i, shifts, holders)
        if block.attention is not None:
            yield AttentionWeights(block.attention, patch, layout, tower.family.appended)
        if block.bias is not None:
            module, method = block.bias
            yield PositionBias(module, patch, layout, tower.family.bias_count, method)


def _shifts(
    block: Block, index: int, units: list[int], patch: Patch, layout: Layout, shift: Callable[..., Tensor]
) -> Iterator[ShiftBefore]:
    owner = patch.owner
    for mlp, own in block.units_by_mlp(units):
        channels = tuple(mlp.first + unit for unit in own.values())
        owners = None if owner is None else tuple(owner[index, unit] for unit in own)
        for consumer in mlp.consumers:
            yield ShiftBefore(consumer, block.module, patch, layout, shift, channels, owners)
