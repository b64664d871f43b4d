"""What becomes of the activations (B, T, K) of register neurons: the largest is taken, and patches fall silent."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MaxOver = Literal["neuron", "layer"]
Zero = Literal["patches", "all"]


def largest(activations: Tensor, max_over: MaxOver, valid: Tensor | None) -> Tensor:
    """The activation of largest magnitude over the tokens, sign kept: (B, 1, K).

    Args:
        max_over: "neuron" for that of each neuron, "layer" for one of all K.
        valid: (B, T) bool, which tokens are no padding and may give it; None: all.
    """
    magnitude = activations.abs()
    if valid is not None:
        magnitude = magnitude.masked_fill(~valid.unsqueeze(-1), -1)
    if max_over == "neuron":
        return activations.gather(1, magnitude.max(1, keepdim=True).indices)
    joint = magnitude.flatten(1).max(1, keepdim=True).indices
    return activations.flatten(1).gather(1, joint).unsqueeze(-1).expand(-1, 1, activations.shape[-1])


def silenced(activations: Tensor, zero: Zero, num_prefix: int, patches: Tensor | None) -> Tensor:
    """The activations, zero on the patches, or on "all" tokens; edited in place where gradients are off.

    Args:
        patches: (1, T) bool, which tokens are patches; None: all behind the prefix.
    """
    if patches is not None and zero == "patches":
        return activations.masked_fill(patches.unsqueeze(-1), 0)
    silent = activations.clone() if torch.is_grad_enabled() else activations
    silent[:, num_prefix if zero == "patches" else 0 :].zero_()  # strict export fails on `= 0`
    return silent


def with_channels(hidden: Tensor, index: Tensor, activations: Tensor) -> Tensor:
    """`hidden` (B, T, H) with other activations in the channels of `index`; edited in place where gradients are off."""
    if torch.is_grad_enabled():
        return hidden.index_copy(-1, index, activations)
    return hidden.index_copy_(-1, index, activations)
