"""Attention's arguments and outputs that have a row for each token: masks, position biases, weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testreg.families.extend import extend_bias
from testreg.patching.layout import Layout
from testreg.patching.override import Override
from testreg.patching.running import layout_now, running
from testreg.patching.state import Patch

_LAYOUT = "_testreg_layout"  # attribute of what a padded or packed block gets beside its tokens


def carry_layout(extended: Any, layout: Layout) -> None:
    """Let an argument tell the layout to gradient checkpointing that recomputes a block from within (transformers)."""
    # A block mask is told by what only it has: its class is in a module that takes half a second to import.
    if torch.is_grad_enabled() and (isinstance(extended, Tensor) or hasattr(extended, "mask_mod")):
        setattr(extended, _LAYOUT, layout)


@dataclass(eq=False)
class AttentionWeights(Override):
    """An attention module that may return its weights: the registers' rows and columns are left out.

    The remaining rows sum to less than one by what the registers received; they are not renormalised.
    """

    patch: Patch
    plain: Layout
    appended: int
    """Tokens that the block appends behind the registers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if running.layout is None:
            _find_layout_of_recomputed(*args, *kwargs.values())
        out = self.original(*args, **kwargs)
        if not self.patch.mode.has_registers or not isinstance(out, tuple) or len(out) < 2:
            return out
        weights = out[1]
        if isinstance(weights, Tensor):
            weights = layout_now(self.plain).without_registers(weights, self.appended)
        elif isinstance(weights, list):  # of packed images
            weights = [each if each is None else self.plain.without_registers(each) for each in weights]
        return out[0], weights, *out[2:]


def _find_layout_of_recomputed(*arguments: Any) -> None:
    """Let this thread know the layout of a block that gradient checkpointing in transformers recomputes from within.

    `RegisterBlock` is not called again then: the arguments of the block carry its layout (`carry_layout`).
    """
    layout: Layout | None = None
    for extra in arguments:
        layout = getattr(extra, _LAYOUT, layout)
    if layout is not running.recomputed:
        running.recomputed = layout


@dataclass(eq=False)
class PositionBias(Override):
    """A method that makes a relative position bias (..., T, T): it has none for the registers."""

    patch: Patch
    plain: Layout
    count: str
    """Argument that counts the tokens; "" if there is none."""
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.patch.mode.has_registers:
            return self.original(*args, **kwargs)
        if self.count in kwargs:
            kwargs[self.count] -= self.patch.num_registers
        return extend_bias(self.original(*args, **kwargs), self.plain)
