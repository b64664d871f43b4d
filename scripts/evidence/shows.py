"""The row `shows`: outliers, attention to them, and how far outputs are from those of the plain network.

*Former* outliers are the patches that are outliers in the plain network: their norm after the last block is more than
twice the median norm of their image. They are the same patches for all columns.

Shapes: n images, L blocks, N patches, C width, D size of an embedding.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from testreg.evaluation.bootstrap import Array, Metric, Scores, mean_of, ratio, ratio_of
from testreg.evaluation.clip import embed_images
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.features import Features
from testreg.evaluation.result import Result
from testreg.evaluation.samples import images_under, random_subset, sample_of_file
from testreg.families.kernels import attention_kernel
from testreg.measure.attention import UNSEEN, AttentionRecorder, attention_to_patches
from testreg.measure.hooks import recorded_norms, recorded_tokens
from testreg.measure.observation import neighbour_cosine
from testreg.neurons import AnyNeurons

FACTOR = 2  # a patch is an outlier if its norm is above so many times the median norm of its image


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    **settings: Any,
) -> Result:
    """Measure outliers, attention to them, and how embeddings and patches change, on the images of a folder.

    Outliers: `outliers_left` is the number of outliers after the block that has most, over the same in the plain
    network; `max_over_median` is the largest norm over the median norm after the last block.

    Attention: `attention_on_outliers` is the share of the patches' attention that former outliers get together; `sink`
    is the mean attention that a former outlier gets over that of another patch; both are of the block where they are
    largest, among the second half of the blocks without the last. `hottest` is the share of CLS' attention to patches,
    in the last block, that goes to the patch that gets most.

    Outputs: `embed` is the cosine of the image's embedding with that of the plain network, after the mean of the latter
    was subtracted from both; `normal` is the same for patches after the last block that are not former outliers,
    without the mean. `former` and `others` are the cosines of former outliers, and of the other patches, with their
    four neighbours, after the last block but one.

    Args:
        data: a folder of images, which get the preprocessing of the model's library.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    samples = random_subset(
        [sample_of_file(file, None) for file in images_under(Path(data))], settings_.num_images, settings_.seed
    )
    evaluation = Evaluation("shows", model, data, settings_, neurons=neurons, against=against)
    plain, *others = [
        (variant.name, evaluation.features(variant, samples, None, compute, {})) for variant in evaluation.variants
    ]
    plain_recorded = Recorded(plain[1])
    scores = {name: score(plain_recorded, Recorded(found)) for name, found in (plain, *others)}
    return evaluation.result(
        scores, {"images": len(samples), "outlier": f"norm > {FACTOR} x median behind the last block"}
    )


def compute(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """What is recorded for images, all but "embedding" for each patch.

    "embedding" (B, D); "norms" after each block (B, L, N); "last", the tokens after the last block (B, N, C); "near",
    the cosine with the neighbours after the last block but one (B, N); "attention", what each patch gets from all
    patches in each block (B, L, N); "cls", what it gets from CLS in the last block (B, N).
    """
    tower, patches, grid = variant.tower, variant.tower.patches(images), variant.tower.grid(images)
    with (
        attention_kernel(tower.module, "sdpa", instead_of=UNSEEN),
        AttentionRecorder(lambda num_tokens: patches) as attention,
        recorded_norms(tower, images) as norms,
        recorded_tokens(tower, images, -2) as before,
        recorded_tokens(tower, images, -1) as last,
    ):
        embedding = embed_images(variant, images)
    if len(attention.recorded) != tower.depth:
        raise RuntimeError(f"saw {len(attention.recorded)} attentions in {tower.depth} blocks")
    earlier = before[0][:, patches].float()
    return {
        "embedding": embedding,
        "norms": torch.stack(norms, 1)[..., patches],
        "last": last[0][:, patches].float(),
        "near": neighbour_cosine(earlier, earlier.norm(dim=-1), grid),
        "attention": torch.stack([each.mean(1)[:, patches] for each in attention.recorded], 1),
        "cls": attention_to_patches(tower, images).mean(1),
    }


class Recorded:
    """What `compute` recorded for all images."""

    def __init__(self, found: Features) -> None:
        names = ("embedding", "norms", "last", "near", "attention", "cls")
        self.embedding, self.norms, self.last, self.near, self.attention, self.cls = map(found.stacked, names)
        self.median = self.norms.median(-1, keepdim=True).values  # (n, L, 1)
        depth = self.norms.shape[1]
        self.inner = self.attention[:, depth // 2 : depth - 1]  # (n, blocks, N)


def score(plain: Recorded, variant_: Recorded) -> Scores:
    """The metrics of a variant, from what was recorded for the plain network and for the variant."""
    was_outlier = plain.norms[:, -1] > FACTOR * plain.median[:, -1]  # (n, N)
    before = (plain.norms > FACTOR * plain.median).sum(-1)  # (n, L)
    after = (variant_.norms > FACTOR * torch.maximum(plain.median, variant_.median)).sum(-1)
    mean = plain.embedding.mean(0)
    to_former, to_others = (
        (variant_.inner * mask[:, None]).sum(-1) for mask in (was_outlier, ~was_outlier)
    )  # (n, blocks)
    normal = F.cosine_similarity(variant_.last, plain.last, dim=-1)
    return {
        "outliers_left": ratio_of_largest(after, before),
        "max_over_median": mean_of((variant_.norms.amax(-1) / variant_.median[..., 0])[:, -1]),
        "attention_on_outliers": largest_mean(to_former),
        "sink": sink_of(to_former, to_others, was_outlier),
        "hottest": mean_of(variant_.cls.amax(1) / variant_.cls.sum(1)),
        "embed": mean_of(F.cosine_similarity(variant_.embedding - mean, plain.embedding - mean, dim=-1)),
        "normal": ratio_of((normal * ~was_outlier).sum(1), (~was_outlier).sum(1)),
        "former": ratio_of((variant_.near * was_outlier).sum(1), was_outlier.sum(1)),
        "others": ratio_of((variant_.near * ~was_outlier).sum(1), (~was_outlier).sum(1)),
    }


def ratio_of_largest(after: Tensor, before: Tensor) -> Metric:
    """The largest total of a block after, over the largest total before, from counts (n, L) in each image."""
    rows, depth = torch.cat([after, before], 1).double().numpy(), after.shape[1]
    return Metric(rows, lambda sums: ratio(sums[..., :depth].max(-1), sums[..., depth:].max(-1)))


def largest_mean(values: Tensor) -> Metric:
    """The mean over images of values (n, blocks), in the block where it is largest."""
    rows = torch.cat([values, torch.ones(len(values), 1)], 1).double().numpy()
    return Metric(rows, lambda sums: (sums[..., :-1] / sums[..., -1:]).max(-1))


def sink_of(to_former: Tensor, to_others: Tensor, was_outlier: Tensor) -> Metric:
    """The mean attention of a former outlier over that of another patch, in the block where the ratio is largest.

    Args:
        to_former: the attention to all former outliers of an image, (n, blocks).
        to_others: the attention to all its other patches.
        was_outlier: which patches are former outliers, (n, N).
    """
    counts = torch.stack([was_outlier.sum(1), (~was_outlier).sum(1)], 1)
    rows, blocks = torch.cat([to_former, to_others, counts], 1).double().numpy(), to_former.shape[1]

    def of_sum(sums: Array) -> Array:
        mean_former = ratio(sums[..., :blocks], sums[..., -2:-1])
        mean_others = ratio(sums[..., blocks : 2 * blocks], sums[..., -1:])
        return ratio(mean_former, mean_others).max(-1)

    return Metric(rows, of_sum)
