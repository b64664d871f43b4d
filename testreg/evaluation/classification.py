"""What the tasks of classification share: the features of an image, and top-1 and top-5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from testreg.evaluation.bootstrap import Scores, mean_of
from testreg.evaluation.evaluation import Evaluation, Variant
from testreg.evaluation.features import Features
from testreg.evaluation.preparing import IMAGENET_ZOOM, Square, normalisation_of
from testreg.evaluation.samples import Sample
from testreg.measure.tokens import global_token, normed_tokens

BLOCKS = 4


def global_features(evaluation: Evaluation, variant: Variant, samples: Sequence[Sample[int]], size: int) -> Features:
    """`cls` (4, C) and `mean` (C,) of the middle of each image, as `features` has them: computed once for all tasks."""
    prepare = Square(normalisation_of(variant.transform), size, "crop", IMAGENET_ZOOM)
    return evaluation.features(variant, samples, prepare, features, {"task": "classification"})


def features(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """The global tokens of the last blocks (B, 4, C), the last block's first, and the mean of its patches (B, C)."""
    tower = variant.tower
    tokens = normed_tokens(tower, images, min(BLOCKS, tower.depth))[::-1]
    cls = torch.stack([global_token(each.float(), tower) for each in tokens], dim=1)
    return {"cls": cls, "mean": tokens[0][:, tower.patches(images)].float().mean(1)}


def top_1_and_5(logits: Tensor, truth: Tensor) -> Scores:
    """The share of images whose class (n,) is the first, or among the first five, of the logits (n, classes)."""
    order = logits.topk(min(5, logits.shape[1])).indices
    right = order == truth[:, None]
    return {"top1": mean_of(right[:, 0].double()), "top5": mean_of(right.any(1).double())}
