"""Outliers moved onto patches of one's choice: the register neurons fire there, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from testreg.families import Tower


@contextmanager
def steered(tower: Tower, neurons: Mapping[int, Sequence[int]], mask: Tensor) -> Iterator[None]:
    """Within the context, the largest activation of each neuron is copied to the patches of a mask (B, N).

    Everywhere else among the patches the neuron is silent; prefix tokens keep theirs (arXiv 2506.08010, section 5).
    The tower must not be patched.
    """
    prefix = torch.zeros(len(mask), tower.num_prefix, dtype=torch.bool, device=mask.device)
    target = torch.cat([prefix, mask], dim=1).unsqueeze(-1)  # (B, T, 1)
    keep = torch.cat([~prefix, torch.zeros_like(mask)], dim=1).unsqueeze(-1)
    with ExitStack() as stack:
        for block, units in neurons.items():
            for mlp, own in tower.blocks[block].units_by_mlp(units):
                channels = [mlp.first + unit for unit in own.values()]
                hook = mlp.fc2.register_forward_pre_hook(_mover(tower, channels, target, keep))
                stack.callback(hook.remove)
        yield


def _mover(tower: Tower, channels: list[int], target: Tensor, keep: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = tower.batch_first(args[0])
        activations = hidden[..., channels]  # (B, T, K)
        peak = activations.gather(1, activations.abs().max(1, keepdim=True).indices)
        moved = hidden.clone()
        moved[..., channels] = torch.where(target, peak, activations * keep)
        return (tower.batch_first(moved), *args[1:])  # a transposition is its own inverse

    return hook
