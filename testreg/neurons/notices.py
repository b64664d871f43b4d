"""Warnings and log messages about register neurons that may not be right for a model."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor, nn

from testreg.families import Tower, activation, checkpoint_names, compare_weights, mismatch_of
from testreg.files import plain
from testreg.neurons import RegisterNeurons, UnverifiedNeuronsWarning

MAX_SIZE_RATIO = 2  # a model may run on so many times the patches that neurons were verified on, or so many times fewer

_log = logging.getLogger("testreg")
_warned: WeakSet[nn.Module] = WeakSet()
"""The towers whose activation was warned of: once for each, since calibration patches a model many times."""


def warn_of_other_weights(neurons: RegisterNeurons, model: nn.Module, tower: Tower) -> None:
    """Warn if the neurons were found in other weights than the tower's; if in similar ones, log it."""
    expected = neurons.model.get("fingerprint")
    if expected is None:
        return
    likeness = compare_weights(expected, tower)
    found_in = plain(neurons.model.get("name", "another checkpoint"))
    here = " = ".join(checkpoint_names(model)) or f"this {type(model).__name__} (its checkpoint is unknown)"
    if likeness == "similar":
        _log.info(
            "the weights of %s are those of %s, quantised or fine-tuned: its register neurons are used", here, found_in
        )
    if likeness == "other":
        warnings.warn(
            f"these register neurons were found in {found_in}, whose weights are not those of {here}: "
            "calibrate the model itself if its artefacts stay",
            stacklevel=_stacklevel(),
        )


def warn_of_activation(model: nn.Module, tower: Tower, neurons: RegisterNeurons | None = None) -> None:
    """Warn if the model computes another activation than the one that its checkpoint was trained with.

    This is done once for a model. Warn as well if it is not that of the network in which the neurons were found.
    """
    if tower.module not in _warned and (wrong := mismatch_of(model, tower)) is not None:
        _warned.add(tower.module)
        warnings.warn(
            f"this {type(model).__name__} computes {wrong.own}, but {wrong.checkpoint} was trained with "
            f"{wrong.trained_with}: outputs and register neurons are not those of the trained network. "
            f"Load {wrong.right} instead",
            stacklevel=_stacklevel(),
        )
    found_with = None if neurons is None else neurons.model.get("activation")
    own = activation(tower)
    if None not in (found_with, own) and found_with != own:
        warnings.warn(
            f"these register neurons were found in a network that computes {plain(found_with)}, and this "
            f"{type(model).__name__} computes {own}: calibrate the model itself if its artefacts stay",
            stacklevel=_stacklevel(),
        )


def warn_of_unverified(neurons: RegisterNeurons) -> None:
    """Warn if the neurons are from a list that was not verified."""
    if neurons.has_to_be_trusted:
        if neurons.calibration.verified_at:
            why = (
                "they were measured, but the target was not met, or not on 16 images that had no part in the choice. "
                "testreg.calibrate takes 64 images or more for that"
            )
        else:
            why = (
                "no measurement on images shows what they do in this checkpoint. testreg.diagnose tells whether it has "
                "outliers at all, testreg.calibrate finds and verifies neurons for it"
            )
        warnings.warn(
            f"the register neurons of {neurons.source or 'this list'} are not verified: {why}",
            UnverifiedNeuronsWarning,
            stacklevel=_stacklevel(),
        )


def log_bundled(neurons: RegisterNeurons, model: nn.Module) -> None:
    """Log which of the bundled lists was taken for a model."""
    source = neurons.provenance.get("source")
    found_by = source.get("repo") or source.get("command") if isinstance(source, Mapping) else source
    _log.info(
        "patched %s with the bundled list %s: %d register neurons of %s, %s",
        type(model).__name__,
        neurons.source,
        len(neurons.ranking),
        plain(found_by or "unknown origin"),
        "verified" if neurons.verified else "not verified",
    )


class VerifiedUse:
    """The image sizes and dtypes with which register neurons were verified."""

    def __init__(self, neurons: RegisterNeurons) -> None:
        verified = neurons.calibration.verified_at
        self.num_patches = [math.prod(each.grid) for each in verified]
        self.dtypes = {each.dtype for each in verified}
        self.warns = bool(verified)

    def check(self, num_patches: int, tokens: Tensor) -> None:
        """Warn, once, of an image size far from all with which the neurons were verified, or of another dtype."""
        if not self.warns:
            return
        device = tokens.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on "meta"
        dtype = str(torch.get_autocast_dtype(device) if autocast else tokens.dtype).removeprefix("torch.")
        far = all(max(num_patches / each, each / num_patches) > MAX_SIZE_RATIO for each in self.num_patches)
        # Neurons that were verified in a coarser dtype are good in float32 and float64; not the other way round.
        if far or dtype not in self.dtypes | {"float32", "float64"}:
            self.warns = False
            numbers, dtypes = " and ".join(map(str, self.num_patches)), " and ".join(sorted(self.dtypes))
            warnings.warn(
                f"the register neurons were verified on images of {numbers} patches in {dtypes}, and are used on "
                f"{num_patches} in {dtype}: they may do less there. Calibrate at this size and in this dtype too "
                "(testreg calibrate MODEL --image-size A --image-size B, --amp)",
                stacklevel=2,
            )


def _stacklevel() -> int:
    """The level of the code outside testreg that called into it, seen from the function that calls this one."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "testreg":
        frame, level = frame.f_back, level + 1
    return level
