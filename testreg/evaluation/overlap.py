"""How a predicted mask and the true one lie over each other."""

from __future__ import annotations

import torch

from testreg.evaluation.bootstrap import Array
from testreg.evaluation.libraries import library

IGNORED = -1  # of pixels that do not count


def overlap(predicted: Array, truth: Array, classes: int) -> tuple[Array, Array, int]:
    """Count an image's pixels: of each class in both masks (h, w), of each class in either, and all that count.

    Only the truth may hold `IGNORED`: such pixels are left out.
    """
    confusion = library("torchmetrics.functional.classification").multiclass_confusion_matrix
    masks = torch.from_numpy(predicted).long(), torch.from_numpy(truth).long()
    pairs = confusion(*masks, num_classes=classes, ignore_index=IGNORED, validate_args=False).numpy()
    both = pairs.diagonal()
    return both, pairs.sum(0) + pairs.sum(1) - both, int(pairs.sum())
