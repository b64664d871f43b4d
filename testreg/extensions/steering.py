"""Steering: the register neurons fire on patches of one's choice, and on no others.

Outliers sit where the register neurons fire (arXiv 2506.08010, section 5), so a mask of patches says where outliers go.
There is no register then.

Shapes: B images, h x w patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from testreg.patching.forward import Mode, running
from testreg.patching.state import patch_of

M = TypeVar("M", bound=nn.Module)


def check_target(target: object) -> None:
    """Raise TypeError or ValueError unless it is a mask (B, h, w) of booleans."""
    if not isinstance(target, Tensor):
        raise TypeError(f"a target mask is a tensor (B, h, w) of booleans, got {type(target).__name__}")
    if target.ndim != 3 or target.dtype is not torch.bool or not target.numel():
        raise ValueError(
            f"a target mask is (B, h, w) booleans, one for each patch, got {target.dtype} {tuple(target.shape)}"
        )


@contextmanager
def steered(model: M, target: Tensor) -> Iterator[M]:
    """Within the `with` block, forwards of a patched model have its outliers where `target` says (section 5).

    There is no register then: the largest activation of each register neuron is copied to the patches of the mask, and
    the neuron is silent on the others. Where the mask of an image is empty, the activations go nowhere: that is not the
    unpatched model but ablation, which costs accuracy, since the network looks for what these neurons write.

    Only forwards that this thread starts are steered, since a mask belongs to a batch; one that is under way is not.
    Contexts nest, and the innermost counts; under `testreg.disabled` the model computes as if it were not patched.

    Args:
        target: (B, h, w) bool, the grid of patches of each image of the batch, or (1, h, w) for all images.

    Raises:
        RuntimeError: the model is not patched.
        TypeError, ValueError: `target` is not such a mask. A forward raises ValueError if it does not fit the images.

    Example:
        >>> target = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> target[0, 0, :2] = True  # two patches at the top left
        >>> with testreg.patched(model, neurons), testreg.steered(model, target):
        ...     outputs = model(images)
    """
    check_target(target)
    own = patch_of(model), Mode(has_registers=False, target=target)
    running.steered = (*running.steered, own)
    try:
        yield model
    finally:
        running.steered = tuple(each for each in running.steered if each is not own)
