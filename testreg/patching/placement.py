"""Which parts of a tower are changed, and by what."""

from __future__ import annotations

from collections.abc import Iterator

from testreg.families import Block, Tower
from testreg.families.layout import Layout
from testreg.patching.attention import AttentionWeights, PositionBias
from testreg.patching.block import BlockCall, RegisterBlock
from testreg.patching.fc2 import MoveInFront
from testreg.patching.override import Part
from testreg.patching.state import Patch


def parts(tower: Tower, patch: Patch) -> Iterator[Part]:
    """What moves the neurons in front of each fc2 that reads some, and what takes registers through each block from the
    one that they enter."""
    layout = Layout(patch.num_registers, tower.sequence_first)
    units = patch.neurons.by_block()
    for i, block in list(enumerate(tower.blocks))[patch.entry_block :]:
        moves = tuple(_moves(block, i, units.get(i, []), patch, layout))
        forward = RegisterBlock(block.module, patch, layout, tower, i, moves)
        yield from (*moves, *(move.compiled for move in moves), forward, BlockCall(block.module, forward))
        if block.attention is not None:
            yield AttentionWeights(block.attention, patch, layout, tower.family.appended)
        if block.bias is not None:
            module, method = block.bias
            yield PositionBias(module, patch, layout, tower.family.bias_count, method)


def _moves(block: Block, index: int, units: list[int], patch: Patch, layout: Layout) -> Iterator[MoveInFront]:
    # If neurons are shared out, each goes to the next register, in the order of the ranking.
    ranks = {(block, unit): rank for rank, (block, unit, _) in enumerate(patch.neurons.ranking)}
    for mlp, own in block.units_by_mlp(units):
        channels = tuple(mlp.first + unit for unit in own.values())
        owners = tuple(ranks[index, unit] % patch.num_registers for unit in own) if patch.split_neurons else None
        width = mlp.first + mlp.width
        for linear in mlp.consumers:
            yield MoveInFront(linear, block.module, index, patch, layout, channels, owners, width, linear is mlp.fc2)
