"""Attention's arguments and outputs that have a row for each token: masks, position biases, weights."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from testreg.families.extend import extend_bias
from testreg.families.kernels import returns_weights
from testreg.families.layout import Layout
from testreg.patching.forward import layout_now, running
from testreg.patching.override import Override
from testreg.patching.state import Patch

_MATMUL = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)
_LAYOUT = "_testreg_layout"  # attribute of what a padded or packed block gets beside its tokens


def carry_layout(extended: Any, layout: Layout) -> None:
    """Attach the layout to an extended argument of a block, for gradient checkpointing that recomputes a block from
    within (transformers)."""
    # A block mask is recognised by an attribute that only it has: its class is in a module that takes half a second to
    # import.
    if torch.is_grad_enabled() and (isinstance(extended, Tensor) or hasattr(extended, "mask_mod")):
        setattr(extended, _LAYOUT, layout)


@dataclass(eq=False)
class AttentionWeights(Override):
    """An attention module that may return its weights: the registers' rows and columns are left out.

    The remaining rows sum to less than one by what the registers received; they are not renormalised.
    """

    patch: Patch
    default_layout: Layout
    appended: int
    """How many tokens the block itself appends behind the registers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if running.layout is None:
            _find_layout_of_recomputed(*args, *kwargs.values())
        layout, used = layout_now(self.default_layout), _UsedWeights(self.default_layout)
        may_need_gradient = torch.is_grad_enabled() and layout.lengths is None and not self.appended
        is_used = may_need_gradient and not torch.compiler.is_compiling() and returns_weights(self.module)
        with used if is_used else nullcontext():
            out = self.original(*args, **kwargs)
        if not self.patch.current_mode.has_registers or not isinstance(out, tuple) or len(out) < 2:
            return out
        weights = out[1]
        if isinstance(weights, Tensor):
            shown = used.shown if weights is used.weights else None
            weights = layout.weights_without_registers(weights, self.appended) if shown is None else shown
        elif isinstance(weights, list):  # of packed images
            weights = [
                each if each is None else self.default_layout.weights_without_registers(each) for each in weights
            ]
        return out[0], weights, *out[2:]


class _UsedWeights(TorchFunctionMode):
    """Sees the weights (B, heads, T+R, T+R) that attention multiplies with the values, while it is active.

    It takes the weights between tokens out (`shown`, which attention returns), and puts them back before the product.
    So the output is computed from the returned tensor, which gets a gradient: relevance maps need it.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.weights: Tensor | None = None
        self.shown: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _MATMUL and len(args) == 2 and args[0].ndim > 2 and args[0].shape[-1] == args[0].shape[-2]:
            self.weights = args[0]
            self.shown = self.layout.weights_without_registers(args[0]).contiguous()
            args = self.layout.weights_with_registers(self.shown, args[0]), args[1]
        return func(*args, **(kwargs or {}))


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
    """A method that makes a relative position bias (..., T, T), which is extended to (..., T+R, T+R) by zeros."""

    patch: Patch
    default_layout: Layout
    count: str
    """Name of the method's argument that is the number of tokens; "" if there is none."""
    method: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.patch.current_mode.has_registers:
            return self.original(*args, **kwargs)
        if self.count in kwargs:
            kwargs[self.count] -= self.patch.num_registers
        return extend_bias(self.original(*args, **kwargs), self.default_layout)
