"""Counts pixels for the IoU (intersection over union) of a predicted and a true mask."""

from __future__ import annotations

import torch

from testreg.evaluation.bootstrap import Array
from testreg.evaluation.libraries import library

IGNORED = -1  # value of pixels in a true mask that are left out of all counts


def overlap(predicted: Array, truth: Array, classes: int) -> tuple[Array, Array, int]:
    """The intersection (classes,) and union (classes,) of two masks (h, w) in pixels, and how many pixels were counted.

    Pixels that are `IGNORED` in the truth are not counted.
    """
    confusion = library("torchmetrics.functional.classification").multiclass_confusion_matrix
    masks = torch.from_numpy(predicted).long(), torch.from_numpy(truth).long()
    pairs = confusion(*masks, num_classes=classes, ignore_index=IGNORED, validate_args=False).numpy()
    both = pairs.diagonal()
    return both, pairs.sum(0) + pairs.sum(1) - both, int(pairs.sum())
