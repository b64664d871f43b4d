"""What a network shows of its outliers on photographs, and how far its outputs are from the plain network's.

Patches that were outliers are those of the plain network: their norm behind the last block is over twice the median of
their image. They are the same in all columns.

Shapes: n images, L blocks, N patches, C width, D embedding.
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
from testreg.measure.attention import UNSEEN, Recorder, attention_to_patches
from testreg.measure.hooks import recorded_norms, recorded_tokens
from testreg.measure.observation import neighbour_cosine
from testreg.neurons import AnyNeurons

FACTOR = 2  # times the median of an image's norms, above which a patch is an outlier


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    **settings: Any,
) -> Result:
    """Outliers, attention to them, and what becomes of embeddings and patches, on the images of a folder.

    `outliers_left`: outliers behind the block that has most, over those of the plain network; `max_over_median`: the
    largest norm over the median behind the last block. `attention_on_outliers`: what patches give to the patches that
    were outliers, as a share of all they give; `sink`: what they give to one of these over what they give to another
    patch; both of the worst block of the second half but the last. `hottest`: the share of CLS' attention to
    patches, in the last block, that its hottest patch gets.

    `embed`: cosine of the image's embedding to the plain network's, the mean of the latter subtracted from both;
    `normal`: of the other patches behind the last block. `former`, `others`: cosine to their four neighbours, one block
    before the end, of the patches that were outliers and of the others.

    Args:
        data: a folder of images, which are prepared as the model's own library does.
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
    seen = Seen(plain[1])
    scores = {name: score(seen, Seen(found)) for name, found in (plain, *others)}
    return evaluation.result(
        scores, {"images": len(samples), "outlier": f"norm > {FACTOR} x median behind the last block"}
    )


def compute(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """Of images: the embedding (B, D), norms (B, L, N), the patches behind the last block (B, N, C), the cosine to
    their neighbours one block earlier (B, N), what patches give to each in each block (B, L, N), and CLS in the last
    (B, N)."""
    tower, patches, grid = variant.tower, variant.tower.patches(images), variant.tower.grid(images)
    with (
        attention_kernel(tower.module, "sdpa", instead_of=UNSEEN),
        Recorder(lambda num_tokens: patches) as attention,
        recorded_norms(tower, images) as norms,
        recorded_tokens(tower, images, -2) as before,
        recorded_tokens(tower, images, -1) as last,
    ):
        embedding = embed_images(variant, images)
    if len(attention.rows) != tower.depth:
        raise RuntimeError(f"saw {len(attention.rows)} attentions in {tower.depth} blocks")
    earlier = before[0][:, patches].float()
    return {
        "embedding": embedding,
        "norms": torch.stack(norms, 1)[..., patches],
        "last": last[0][:, patches].float(),
        "near": neighbour_cosine(earlier, earlier.norm(dim=-1), grid),
        "attention": torch.stack([rows.mean(1)[:, patches] for rows in attention.rows], 1),
        "cls": attention_to_patches(tower, images).mean(1),
    }


class Seen:
    """What `compute` gave for all images."""

    def __init__(self, found: Features) -> None:
        names = ("embedding", "norms", "last", "near", "attention", "cls")
        self.embedding, self.norms, self.last, self.near, self.attention, self.cls = map(found.stacked, names)
        self.median = self.norms.median(-1, keepdim=True).values  # (n, L, 1)
        depth = self.norms.shape[1]
        self.inner = self.attention[:, depth // 2 : depth - 1]  # (n, blocks, N)


def score(plain: Seen, seen: Seen) -> Scores:
    """The metrics of a variant, over the images."""
    former = plain.norms[:, -1] > FACTOR * plain.median[:, -1]  # (n, N)
    before = (plain.norms > FACTOR * plain.median).sum(-1)  # (n, L)
    after = (seen.norms > FACTOR * torch.maximum(plain.median, seen.median)).sum(-1)
    mean = plain.embedding.mean(0)
    on_former, on_others = ((seen.inner * mask[:, None]).sum(-1) for mask in (former, ~former))  # (n, blocks)
    normal = F.cosine_similarity(seen.last, plain.last, dim=-1)
    return {
        "outliers_left": ratio_of_largest(after, before),
        "max_over_median": mean_of((seen.norms.amax(-1) / seen.median[..., 0])[:, -1]),
        "attention_on_outliers": largest_mean(on_former),
        "sink": sink_of(on_former, on_others, former),
        "hottest": mean_of(seen.cls.amax(1) / seen.cls.sum(1)),
        "embed": mean_of(F.cosine_similarity(seen.embedding - mean, plain.embedding - mean, dim=-1)),
        "normal": ratio_of((normal * ~former).sum(1), (~former).sum(1)),
        "former": ratio_of((seen.near * former).sum(1), former.sum(1)),
        "others": ratio_of((seen.near * ~former).sum(1), (~former).sum(1)),
    }


def ratio_of_largest(after: Tensor, before: Tensor) -> Metric:
    """The largest sum over images of counts (n, L), over that of others."""
    rows, depth = torch.cat([after, before], 1).double().numpy(), after.shape[1]
    return Metric(rows, lambda sums: ratio(sums[..., :depth].max(-1), sums[..., depth:].max(-1)))


def largest_mean(values: Tensor) -> Metric:
    """The largest mean over images of values (n, blocks)."""
    rows = torch.cat([values, torch.ones(len(values), 1)], 1).double().numpy()
    return Metric(rows, lambda sums: (sums[..., :-1] / sums[..., -1:]).max(-1))


def sink_of(on_former: Tensor, on_others: Tensor, former: Tensor) -> Metric:
    """What a patch that was an outlier gets over what another gets, in the block where that is most, from the sums
    (n, blocks) over either kind, of images with such patches (n, N)."""
    counts = torch.stack([former.sum(1), (~former).sum(1)], 1)
    rows, blocks = torch.cat([on_former, on_others, counts], 1).double().numpy(), on_former.shape[1]

    def of_sum(sums: Array) -> Array:
        mean_former = ratio(sums[..., :blocks], sums[..., -2:-1])
        mean_others = ratio(sums[..., blocks : 2 * blocks], sums[..., -1:])
        return ratio(mean_former, mean_others).max(-1)

    return Metric(rows, of_sum)
