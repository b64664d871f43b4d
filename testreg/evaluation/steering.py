"""Outliers moved onto patches of one's choice: the register neurons fire there, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from testreg.families import Tower
from testreg.measure.hooks import replacing_inputs


@contextmanager
def steered(tower: Tower, neurons: Mapping[int, Sequence[int]], mask: Tensor) -> Iterator[None]:
    """Within the context, the largest activation of each neuron is copied to the patches of a mask (B, N).

    Everywhere else among the patches the neuron is silent; prefix tokens keep theirs (arXiv 2506.08010, section 5).
    The tower must not be patched.
    """
    prefix = torch.zeros(len(mask), tower.num_prefix, dtype=torch.bool, device=mask.device)
    target = torch.cat([prefix, mask], dim=1).unsqueeze(-1)  # (B, T, 1)
    keep = torch.cat([~prefix, torch.zeros_like(mask)], dim=1).unsqueeze(-1)
    moved = [
        (mlp, [mlp.first + unit for unit in own.values()])
        for block, units in neurons.items()
        for mlp, own in tower.blocks[block].units_by_mlp(units)
    ]

    def move(index: int, tokens: Tensor) -> Tensor:
        _, channels = moved[index]
        hidden = tower.batch_first(tokens)
        activations = hidden[..., channels]  # (B, T, K)
        peak = activations.gather(1, activations.abs().max(1, keepdim=True).indices)
        hidden = hidden.clone()
        hidden[..., channels] = torch.where(target, peak, activations * keep)
        return tower.batch_first(hidden)  # a transposition is its own inverse

    with replacing_inputs([mlp.fc2 for mlp, _ in moved], move):
        yield
