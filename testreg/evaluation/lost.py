"""Object discovery with LOST (arXiv 2109.14279): it draws one box on each image, from the features of patches alone.

LOST counts for each patch how many others are similar to it: its degree. The patch of lowest degree is the seed. It is
joined with patches of low degree that are similar to it, and the box is drawn around the connected patches, the seed
among them, whose similarities to these sum up to more than 0. Outliers (patches of huge norm) are unlike all other
patches, so LOST takes them for objects: registers matter for this task more than for any other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, box_iou

from testreg.evaluation.bootstrap import Scores, mean_of
from testreg.evaluation.boxes import Objects, boxed_images
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.figures import Panel, picture_of_rows
from testreg.evaluation.libraries import library
from testreg.evaluation.preparing import PaddedToPatches, Square, normalisation_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, random_subset
from testreg.measure.hooks import recorded_tokens
from testreg.measure.tokens import Part, behind_norm, global_token, recorded_projections
from testreg.neurons import AnyNeurons

CANDIDATES = 100  # so many patches of lowest degree may be joined with the seed
PARTS: tuple[Part, ...] = ("q", "k", "v")  # features that patches can be compared by
SWEPT_BLOCKS, SWEPT_BIASES = 4, 11  # how many blocks and biases the sweep tries
WHOLE_IMAGE_SHARE = 0.9  # a box with a larger share of the image's area does not tell where the object is
CENTRED_SHARE = 0.7  # the share of each side of the image that the baseline's centred box takes


def lost(
    features: Tensor, grid: tuple[int, int], *, bias: float = 0.0, candidates: int = CANDIDATES
) -> tuple[Tensor, int]:
    """The box (4,) that LOST draws: left, top, right, bottom, in patches; and the index of the seed.

    Args:
        features: the features of the patches, (N, C), row by row.
        grid: rows and columns of patches.
        bias: added to the inner product of two patches; they are similar if the sum is above 0.
        candidates: so many patches of lowest degree may be joined with the seed.
    """
    similarity = features @ features.T + bias
    positive = similarity > 0
    degree = positive.sum(0) - positive.diagonal().int()  # a patch's similarity to itself is not counted
    order = degree.argsort(stable=True)
    seed = int(order[0])
    lowest = order[:candidates]
    mask = (similarity[lowest[positive[seed, lowest]]].sum(0) > 0).unflatten(0, grid).cpu().numpy()
    row, column = divmod(seed, grid[1])
    mask[row, column] = True  # with a negative bias, the seed may not be similar even to itself
    components, _ = library("scipy.ndimage").label(mask)
    rows, columns = np.nonzero(components == components[row, column])
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]), seed


@dataclass(frozen=True)
class LostSettings:
    """The settings of one run of LOST."""

    block: int
    """The block whose features are compared; negative numbers count from the end."""
    feature: Part
    bias: float = 0.0
    normalise: bool = False
    """Whether features are scaled to length 1, as in the sweep of Jiang et al."""

    @property
    def name(self) -> str:
        """The settings in words."""
        return f"block {self.block}, {self.feature}, bias {self.bias:g}{', normalised' if self.normalise else ''}"


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    names: str | None = None,
    feature: Literal["q", "k", "v"] = "k",
    block: int = -1,
    bias: float = 0.0,
    sweep: bool = False,
    size: int | None = None,
    **settings: Any,
) -> Result:
    """Object discovery: CorLoc, the share of images whose LOST box has an IoU of at least 0.5 with a true box.

    `hit_ratio` is the share of images in which the centre of the patch most similar to CLS lies in a true box.
    `whole_image` is the share of images whose LOST box takes more than 90 % of the image. If objects are large, such
    boxes count as correct although they find nothing: compare with the baseline `corloc_whole_image`, a box around each
    image.

    Args:
        data: a folder of VOC (JPEGImages, Annotations) or COCO (annotations/instances_*.json and the images).
        names: a file that lists the images to take (COCO20k), one name on each line.
        feature: what patches are compared by: the queries (q), keys (k) or values (v) of a block.
        block: the block whose features are compared; negative numbers count from the end.
        bias: added to the inner product of two patches; they are similar if the sum is above 0.
        sweep: also choose the best of the last 4 blocks, q, k and v, and 11 biases in [-1, 0], with features of length
            1, and of this block and bias with q, k and v, on half of the images; all metrics are then measured on the
            other half.
        size: squash images to a square of that side in pixels; None for their own size, padded to whole patches.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    samples = random_subset(boxed_images(data, names), settings_.num_images, settings_.seed)
    if sweep and len(samples) < 2:
        raise ValueError("a sweep chooses on half of the images and reports the other: it needs at least 2")
    evaluation = Evaluation("lost", model, data, settings_, neurons=neurons, against=against, image_size=size or "any")
    from_arguments = [LostSettings(block, part, bias) for part in PARTS]
    proposals = {
        variant.name: _proposals(evaluation, variant, samples, from_arguments, sweep, size)
        for variant in evaluation.variants
    }
    scored = list(range(len(samples)))[1::2] if sweep else list(range(len(samples)))  # indices of reported images
    scores: dict[str, Scores] = {}
    chosen_by_sweep: dict[str, str] = {}
    by_feature: dict[str, dict[str, float]] = {}
    for name, (choices, boxes, hits) in proposals.items():
        is_correct = torch.stack([_is_correct(boxes[:, i], samples) for i in range(len(choices))])  # (choices, n)
        metrics = {
            "corloc": mean_of(is_correct[PARTS.index(feature), scored]),
            "hit_ratio": mean_of(hits[scored]),
            "whole_image": mean_of(_is_whole(boxes[:, PARTS.index(feature)], samples)[scored]),
        }
        by_feature[name] = {part: float(is_correct[i, scored].mean()) for i, part in enumerate(PARTS)}
        if sweep:
            best = int(is_correct[:, 0::2].mean(1).argmax())  # on the half that is not reported
            metrics["corloc_sweep"] = mean_of(is_correct[best, scored])
            chosen_by_sweep[name] = choices[best].name
        scores[name] = metrics
    scored_samples = [samples[i] for i in scored]

    def panels(i: int) -> list[Panel]:
        image = np.asarray(samples[i].open())
        made = [Panel(name, image, boxes[i, None, PARTS.index(feature)]) for name, (_, boxes, _) in proposals.items()]
        return [Panel("truth", image, samples[i].target.boxes), *made]

    return evaluation.result(
        scores,
        {
            "images": len(scored_samples),
            "feature": feature,
            "block": block,
            "bias": bias,
            "size": size or "native",
            "candidates": CANDIDATES,
            "sweep": {"images": len(samples) - len(scored_samples), "chosen": chosen_by_sweep} if sweep else None,
        },
        baselines={
            "corloc_whole_image": mean_of(
                _is_correct(torch.stack([_centred_box(each, 1.0) for each in scored_samples]), scored_samples)
            ),
            "corloc_centred_box": mean_of(
                _is_correct(torch.stack([_centred_box(each, CENTRED_SHARE) for each in scored_samples]), scored_samples)
            ),
        },
        details={"corloc_by_feature": by_feature},
        pictures={"boxes": lambda: picture_of_rows(panels, len(samples), "LOST")},
    )


def _proposals(
    evaluation: Evaluation,
    variant: Variant,
    samples: Sequence[Sample[Objects]],
    from_arguments: list[LostSettings],
    sweep: bool,
    size: int | None,
) -> tuple[list[LostSettings], Tensor, Tensor]:
    """The boxes that LOST draws with all settings: those `from_arguments`, then those of the sweep.

    Returns:
        The settings; the boxes (n, settings, 4) in pixels of the images; and whether the patch most similar to CLS lies
        in a true box (n,), 0 or 1.
    """
    depth, patch = variant.tower.depth, variant.tower.patch_size
    if not -depth <= from_arguments[0].block < depth:
        raise ValueError(f"the model has no block {from_arguments[0].block}, but {depth} blocks")
    choices = from_arguments
    if sweep:
        blocks, biases = range(-min(SWEPT_BLOCKS, depth), 0), np.linspace(-1, 0, SWEPT_BIASES)
        swept = product(blocks, PARTS, biases)
        choices = from_arguments + [
            LostSettings(block, part, round(float(bias), 3), True) for block, part, bias in swept
        ]
    if size is not None and any(size % side for side in patch):
        raise ValueError(f"size must be a multiple of the model's patches of {patch[0]} x {patch[1]}, got {size}")
    normalise = normalisation_of(variant.transform)
    prepare = PaddedToPatches(normalise, patch) if size is None else Square(normalise, size)

    def compute(variant: Variant, images: Tensor) -> dict[str, Tensor]:
        tower, grid = variant.tower, variant.tower.rows_and_columns(images)
        where = tower.patches(images)
        blocks = sorted({choice.block for choice in choices})
        with recorded_projections(tower, blocks) as parts, recorded_tokens(tower, images, -1) as last:
            tower.run(images)
        boxes = [
            [_box(parts[choice.block][choice.feature][i, where], choice, grid) for choice in choices]
            for i in range(len(images))
        ]
        tokens = behind_norm(tower, last[0]).float()
        patches, global_tokens = tokens[:, where], global_token(tokens, tower)
        score = torch.cosine_similarity(patches, global_tokens.unsqueeze(1), dim=-1)
        return {"boxes": torch.stack([torch.stack(each) for each in boxes]), "best": score.argmax(1)}

    features = evaluation.features(
        variant, samples, prepare, compute, {"choices": [repr(choice) for choice in choices]}
    )
    pairs = list(zip(features, samples, strict=True))
    boxes = torch.stack([_in_pixels(each["boxes"], sample, patch, size) for each, sample in pairs])
    hits = torch.tensor([_hits(int(each["best"]), sample, patch, size) for each, sample in pairs]).double()
    return choices, boxes, hits


def _box(features: Tensor, choice: LostSettings, grid: tuple[int, int]) -> Tensor:
    """The box (4,), in patches, that LOST draws from features (N, C)."""
    features = features.float()
    if choice.normalise:
        features = torch.nn.functional.normalize(features, dim=-1)
    return lost(features, grid, bias=choice.bias)[0]


def _scale(sample: Sample[Objects], patch: tuple[int, int], size: int | None) -> Tensor:
    """The factors (4,) that turn a box in patches into a box in pixels of the original image."""
    height, width = sample.target.size
    rows, columns = patch if size is None else (patch[0] * height / size, patch[1] * width / size)
    return torch.tensor([columns, rows, columns, rows], dtype=torch.float64)


def _in_pixels(boxes: Tensor, sample: Sample[Objects], patch: tuple[int, int], size: int | None) -> Tensor:
    """Boxes (..., 4) in pixels of the original image, from boxes in patches; padding is cut off."""
    height, width = sample.target.size
    edges = torch.tensor([width, height, width, height], dtype=torch.float64)
    return torch.minimum(boxes * _scale(sample, patch, size), edges)


def _hits(best: int, sample: Sample[Objects], patch: tuple[int, int], size: int | None) -> bool:
    """Whether the centre of the patch with the index `best` lies in a true box."""
    row, column = divmod(best, -(-(size or sample.target.size[1]) // patch[1]))
    x, y = ((torch.tensor([column, row]) + 0.5) * _scale(sample, patch, size)[:2]).tolist()
    left, top, right, bottom = sample.target.boxes.T
    return bool(((left <= x) & (x < right) & (top <= y) & (y < bottom)).any())


def _is_correct(boxes: Tensor, samples: Sequence[Sample[Objects]]) -> Tensor:
    """Whether the box of each image (n, 4) has an IoU of at least 0.5 with a true box: (n,), 0 or 1."""
    best = [box_iou(box[None], sample.target.boxes).max() for box, sample in zip(boxes, samples, strict=True)]
    return (torch.stack(best) >= 0.5).double()


def _is_whole(boxes: Tensor, samples: Sequence[Sample[Objects]]) -> Tensor:
    """Whether the box of each image (n, 4) takes more than 90 % of the image: (n,), 0 or 1."""
    sizes = torch.tensor([sample.target.size for sample in samples], dtype=torch.float64)
    return (box_area(boxes) > WHOLE_IMAGE_SHARE * sizes.prod(1)).double()


def _centred_box(sample: Sample[Objects], share: float) -> Tensor:
    """The box (4,) in the middle of an image that takes this share of each side."""
    height, width = sample.target.size
    edges = torch.tensor([width, height, width, height], dtype=torch.float64)
    return edges * torch.tensor([1 - share, 1 - share, 1 + share, 1 + share], dtype=torch.float64) / 2
