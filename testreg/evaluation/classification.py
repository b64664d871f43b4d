"""What `knn` and `linear` share, the features of an image; and the top-1 and top-5 accuracy, which `zeroshot` has
too."""

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

BLOCKS = 4  # the last blocks whose global tokens are used, as in DINOv2's evaluation


def global_features(evaluation: Evaluation, variant: Variant, samples: Sequence[Sample[int]], size: int) -> Features:
    """The features "cls" (4, C) and "mean" (C,) of the middle of each image, see `features`. `knn` and `linear` share
    the cache.

    Args:
        size: side of the square crop that the model sees, in pixels.
    """
    prepare = Square(normalisation_of(variant.transform), size, "crop", IMAGENET_ZOOM)
    return evaluation.features(variant, samples, prepare, features, {"task": "classification"})


def features(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """Two features of images: "cls" (B, 4, C) has the global tokens of the last 4 blocks, beginning with the last one.

    A global token is CLS, or the mean of the patches in models without CLS. "mean" (B, C) is the mean of the last
    block's patch tokens.
    """
    tower = variant.tower
    tokens = normed_tokens(tower, images, min(BLOCKS, tower.depth))[::-1]
    cls = torch.stack([global_token(each.float(), tower) for each in tokens], dim=1)
    return {"cls": cls, "mean": tokens[0][:, tower.patches(images)].float().mean(1)}


def top_1_and_5(logits: Tensor, truth: Tensor) -> Scores:
    """The share of images whose true class (n,) has the largest logit, or one of the five largest (n, classes)."""
    order = logits.topk(min(5, logits.shape[1])).indices
    right = order == truth[:, None]
    return {"top1": mean_of(right[:, 0].double()), "top5": mean_of(right.any(1).double())}
