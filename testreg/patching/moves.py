"""What becomes of the register neurons' activations.

The argument `zero` says what silent means. "patches": a neuron is zero on all patches (released code). "all": it is
zero on all tokens but the registers (paper). "firing": it is brought back to rest on patches where it fires; where it
is at rest it keeps its value, which is not zero with GELU.

Shapes: B batch, T tokens without registers, P prefix tokens, R registers, H hidden, K neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from testreg.patching.index import index_tensor
from testreg.records.options import MaxOver, Zero

AT_REST = -0.28, 0.0  # what GELU, QuickGELU, SiLU and ReLU give for a neuron that does not fire


def shift(
    hidden: Tensor,
    units: Sequence[int],
    owners: Sequence[int] | None = None,
    *,
    num_registers: int = 1,
    num_prefix: int = 1,
    max_over: MaxOver = "neuron",
    zero: Zero = "patches",
    target: Tensor | None = None,
    valid: Tensor | None = None,
    patches: Tensor | None = None,
) -> Tensor:
    """Move the activations of register neurons onto the registers (arXiv 2506.08010, Algorithm 2, the inner loop).

    For each image and neuron, the value of largest magnitude over all tokens, prefix and registers included, is given
    to every register, sign kept (`max_over`="layer": the largest of all K neurons, for each of them). On the
    patches the neuron becomes silent, as `zero` says. With `owners`, each neuron goes to one of the registers alone,
    and is zero on the others (paper A.5). With `target`, the value is given to patches of one's choice instead (section
    5). With neither registers nor target it is given to no token, as static registers need it: these are constants
    (A.2).

    Args:
        hidden: (B, T+R, H) input of an MLP's second linear: P prefix tokens, patches, R registers.
        units: the K register neurons, as channels of `hidden`.
        owners: the register, 0 to R-1, that holds each neuron; None: every register holds all.
        max_over, zero: as in `patch`.
        target: (B, h, w) bool, or (1, h, w) for all images; `hidden` is (B, T, H) then, without registers.
        valid: (B, T+R) bool, which tokens are no padding and may give the value; None: all.
        patches: (1, T+R) bool, which tokens are patches; None: all between the prefix and the registers.

    Returns:
        The tensor like `hidden`. Where gradients are off, `hidden` itself, edited in place.
    """
    index = index_tensor(units, hidden)
    activations = hidden.index_select(-1, index)  # (B, T+R, K)
    write = hidden.index_copy if torch.is_grad_enabled() else hidden.index_copy_
    if target is None and not num_registers:
        return write(-1, index, _silenced(activations, zero, num_prefix, patches))
    peak = _largest(activations, max_over, valid)  # (B, 1, K)
    moved = _silenced(activations, zero, num_prefix, patches)
    if target is not None:
        chosen = _tokens_of(target.to(hidden.device), hidden, num_prefix, patches)
        moved = torch.where(chosen.unsqueeze(-1), peak, moved)
    else:
        if owners is not None:
            owned = index_tensor(owners, hidden) == torch.arange(num_registers, device=hidden.device).unsqueeze(-1)
            peak = torch.where(owned, peak, peak.new_zeros(()))  # (B, R, K)
        moved[:, -num_registers:] = peak
    return write(-1, index, moved)


def _largest(activations: Tensor, max_over: MaxOver, valid: Tensor | None) -> Tensor:
    """The activation of largest magnitude over the tokens, sign kept, for each neuron (B, 1, K).

    If `max_over` is "layer", it is the largest of all K neurons, the same for each of them.
    """
    magnitude = activations.abs()
    if valid is not None:
        magnitude = magnitude.masked_fill(~valid.unsqueeze(-1), -1)
    if max_over == "neuron":
        return activations.gather(1, magnitude.max(1, keepdim=True).indices)
    joint = magnitude.flatten(1).max(1, keepdim=True).indices
    return activations.flatten(1).gather(1, joint).unsqueeze(-1).expand(-1, 1, activations.shape[-1])


def _silenced(activations: Tensor, zero: Zero, num_prefix: int, patches: Tensor | None) -> Tensor:
    """The activations, silent on the patches, or on all tokens if `zero` is "all".

    Without `patches`, all tokens behind the prefix become silent, registers included: `shift` fills these afterwards.
    Without `patches` or with `zero`="all", the activations are edited in place where gradients are off.
    """
    if patches is not None and zero != "all":
        silent = activations.clamp(*AT_REST) if zero == "firing" else torch.zeros_like(activations)
        return torch.where(patches.unsqueeze(-1), silent, activations)
    activations = activations.clone() if torch.is_grad_enabled() else activations
    silent = activations if zero == "all" else activations[:, num_prefix:]
    if zero == "firing":
        silent.clamp_(*AT_REST)
    else:
        silent.zero_()  # strict export fails on `= 0`
    return activations


def _tokens_of(target: Tensor, hidden: Tensor, num_prefix: int, patches: Tensor | None) -> Tensor:
    """Which tokens (B or 1, T) the patches of a mask (B or 1, h, w) are; raises ValueError if it does not fit."""
    num_images, num_tokens = hidden.shape[:2]
    masks, rows, columns = target.shape
    num_patches = num_tokens - num_prefix if patches is None else int(patches.sum())
    if masks not in (1, num_images):
        raise ValueError(
            f"the target mask {tuple(target.shape)} is of {masks} images, and the batch has {num_images}: pass one "
            "mask for each image, or (1, h, w) for all"
        )
    if rows * columns != num_patches:
        raise ValueError(
            f"the target mask has {rows} x {columns} = {rows * columns} patches, and the images have {num_patches}: "
            "it must have their grid, height and width in pixels divided by the patch size"
        )
    mask = target.flatten(1)
    if patches is None:
        return torch.cat([mask.new_zeros(masks, num_prefix), mask], 1)
    return patches.new_zeros(masks, num_tokens).masked_scatter(patches, mask)
