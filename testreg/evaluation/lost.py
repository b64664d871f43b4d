"""Object discovery with LOST (arXiv 2109.14279): one box an image, from the patches' features alone.

Registers matter here more than anywhere: outliers are unlike all other patches, so that LOST takes them for objects.
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
from testreg.evaluation.figures import Panel, rows_of
from testreg.evaluation.libraries import library
from testreg.evaluation.preparing import Native, Square, normalisation_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, drawn
from testreg.measure.hooks import recorded_tokens
from testreg.measure.tokens import Part, behind_norm, global_token, recorded_projections
from testreg.neurons import AnyNeurons

CANDIDATES = 100  # patches of lowest degree that may grow the seed
PARTS: tuple[Part, ...] = ("q", "k", "v")
SWEPT_BLOCKS, SWEPT_BIASES = 4, 11
WHOLE = 0.9  # of an image: a box that takes more of it says nothing of where the object is
CENTRED = 0.7  # share of each side that the centred trivial box takes


def lost(
    features: Tensor, grid: tuple[int, int], *, bias: float = 0.0, candidates: int = CANDIDATES
) -> tuple[Tensor, int]:
    """The box of LOST, (4,): left, top, right, bottom, counted in patches; and the number of the seed.

    Args:
        features: (N, C) of the patches, in rows of the grid.
        bias: added to every product of two patches.
        candidates: how many patches of lowest degree may grow the seed.
    """
    similarity = features @ features.T + bias
    positive = similarity > 0
    degree = positive.sum(0) - positive.diagonal().int()  # a patch is no neighbour of its own
    order = degree.argsort(stable=True)
    seed = int(order[0])
    loneliest = order[:candidates]
    mask = (similarity[loneliest[positive[seed, loneliest]]].sum(0) > 0).unflatten(0, grid).cpu().numpy()
    row, column = divmod(seed, grid[1])
    mask[row, column] = True  # with a bias even the seed may be unlike itself
    components, _ = library("scipy.ndimage").label(mask)
    rows, columns = np.nonzero(components == components[row, column])
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]), seed


@dataclass(frozen=True)
class Choice:
    """One way to run LOST."""

    block: int
    feature: Part
    bias: float = 0.0
    normalise: bool = False
    """Whether features have length 1, as in the sweep of Jiang et al."""

    @property
    def name(self) -> str:
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
    """Object discovery: CorLoc, the share of images whose LOST box has IoU of at least .5 with a true one.

    `hit_ratio` is the share of images in which the centre of the patch most similar to CLS lies in a true box.
    `whole_image` is the share whose LOST box takes more than 90 % of the image: where objects are large, these count as
    right, and so does `corloc_whole_image`, which needs no model.

    Args:
        data: a folder of VOC (JPEGImages, Annotations) or COCO (annotations/instances_*.json and the images).
        names: a list of the images to take (COCO20k), a name a line.
        feature: what patches are compared by: the queries (q), keys (k) or values (v) of a block.
        block: the block, negative from the end.
        bias: added to every product of two patches.
        sweep: choose among the last 4 blocks, q, k and v, and 11 biases of [-1, 0] on features of length 1, on half of
            the images, and report the other half; what the other arguments say is reported beside it.
        size: squash images to a square of that side; None for their own size, padded to whole patches.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    samples = drawn(boxed_images(data, names), settings_.num_images, settings_.seed)
    if sweep and len(samples) < 2:
        raise ValueError("a sweep chooses on half of the images and reports the other: it needs at least 2")
    evaluation = Evaluation("lost", model, data, settings_, neurons=neurons, against=against, image_size=size or "any")
    released = [Choice(block, part, bias) for part in PARTS]
    proposals = {
        variant.name: _proposed(evaluation, variant, samples, released, sweep, size) for variant in evaluation.variants
    }
    scored = list(range(len(samples)))[1::2] if sweep else list(range(len(samples)))  # drawn in the order of names
    scores: dict[str, Scores] = {}
    chosen: dict[str, str] = {}
    by_feature: dict[str, dict[str, float]] = {}
    for name, (choices, boxes, hits) in proposals.items():
        right = torch.stack([_right(boxes[:, i], samples) for i in range(len(choices))])  # (choices, n)
        metrics = {
            "corloc": mean_of(right[PARTS.index(feature), scored]),
            "hit_ratio": mean_of(hits[scored]),
            "whole_image": mean_of(_is_whole(boxes[:, PARTS.index(feature)], samples)[scored]),
        }
        by_feature[name] = {part: float(right[i, scored].mean()) for i, part in enumerate(PARTS)}
        if sweep:
            best = int(right[:, 0::2].mean(1).argmax())  # on the other half
            metrics["corloc_sweep"] = mean_of(right[best, scored])
            chosen[name] = choices[best].name
        scores[name] = metrics
    kept = [samples[i] for i in scored]

    def panels(i: int) -> list[Panel]:
        image = np.asarray(samples[i].open())
        made = [Panel(name, image, boxes[i, None, PARTS.index(feature)]) for name, (_, boxes, _) in proposals.items()]
        return [Panel("truth", image, samples[i].target.boxes), *made]

    return evaluation.result(
        scores,
        {
            "images": len(kept),
            "feature": feature,
            "block": block,
            "bias": bias,
            "size": size or "native",
            "candidates": CANDIDATES,
            "sweep": {"images": len(samples) - len(kept), "chosen": chosen} if sweep else None,
        },
        baselines={
            "corloc_whole_image": mean_of(_right(torch.stack([_inner(each, 1.0) for each in kept]), kept)),
            "corloc_centred_box": mean_of(_right(torch.stack([_inner(each, CENTRED) for each in kept]), kept)),
        },
        details={"corloc_by_feature": by_feature},
        pictures={"boxes": lambda: rows_of(panels, len(samples), "LOST")},
    )


def _proposed(
    evaluation: Evaluation,
    variant: Variant,
    samples: Sequence[Sample[Objects]],
    released: list[Choice],
    sweep: bool,
    size: int | None,
) -> tuple[list[Choice], Tensor, Tensor]:
    """The choices, those of the arguments first; the boxes (n, choices, 4) in pixels of the images; the hits (n,)."""
    depth, patch = variant.tower.depth, variant.tower.patch_size
    if not -depth <= released[0].block < depth:
        raise ValueError(f"the model has no block {released[0].block}, but {depth} blocks")
    choices = released
    if sweep:
        blocks, biases = range(-min(SWEPT_BLOCKS, depth), 0), np.linspace(-1, 0, SWEPT_BIASES)
        swept = product(blocks, PARTS, biases)
        choices = released + [Choice(block, part, round(float(bias), 3), True) for block, part, bias in swept]
    if size is not None and any(size % side for side in patch):
        raise ValueError(f"size must be a multiple of the model's patches of {patch[0]} x {patch[1]}, got {size}")
    normalise = normalisation_of(variant.transform)
    prepare = Native(normalise, patch) if size is None else Square(normalise, size)

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
        patches, whole = tokens[:, where], global_token(tokens, tower)
        score = torch.cosine_similarity(patches, whole.unsqueeze(1), dim=-1)
        return {"boxes": torch.stack([torch.stack(each) for each in boxes]), "best": score.argmax(1)}

    features = evaluation.features(
        variant, samples, prepare, compute, {"choices": [repr(choice) for choice in choices]}
    )
    pairs = list(zip(features, samples, strict=True))
    boxes = torch.stack([_in_pixels(each["boxes"], sample, patch, size) for each, sample in pairs])
    hits = torch.tensor([_hits(int(each["best"]), sample, patch, size) for each, sample in pairs]).double()
    return choices, boxes, hits


def _box(features: Tensor, choice: Choice, grid: tuple[int, int]) -> Tensor:
    features = features.float()
    if choice.normalise:
        features = torch.nn.functional.normalize(features, dim=-1)
    return lost(features, grid, bias=choice.bias)[0]


def _scale(sample: Sample[Objects], patch: tuple[int, int], size: int | None) -> Tensor:
    """Pixels of the image for each patch, (4,), as a box has them."""
    height, width = sample.target.size
    rows, columns = patch if size is None else (patch[0] * height / size, patch[1] * width / size)
    return torch.tensor([columns, rows, columns, rows], dtype=torch.float64)


def _in_pixels(boxes: Tensor, sample: Sample[Objects], patch: tuple[int, int], size: int | None) -> Tensor:
    """Boxes (..., 4) in patches, in pixels of the image, without what was padded."""
    height, width = sample.target.size
    edges = torch.tensor([width, height, width, height], dtype=torch.float64)
    return torch.minimum(boxes * _scale(sample, patch, size), edges)


def _hits(best: int, sample: Sample[Objects], patch: tuple[int, int], size: int | None) -> bool:
    """Whether the centre of a patch lies in a true box."""
    row, column = divmod(best, -(-(size or sample.target.size[1]) // patch[1]))
    x, y = ((torch.tensor([column, row]) + 0.5) * _scale(sample, patch, size)[:2]).tolist()
    left, top, right, bottom = sample.target.boxes.T
    return bool(((left <= x) & (x < right) & (top <= y) & (y < bottom)).any())


def _right(boxes: Tensor, samples: Sequence[Sample[Objects]]) -> Tensor:
    """Whether each image's box (n, 4) has IoU of at least .5 with a true one: (n,), 0 or 1."""
    best = [box_iou(box[None], sample.target.boxes).max() for box, sample in zip(boxes, samples, strict=True)]
    return (torch.stack(best) >= 0.5).double()


def _is_whole(boxes: Tensor, samples: Sequence[Sample[Objects]]) -> Tensor:
    """Whether each box (n, 4) takes nearly all of its image: (n,), 0 or 1."""
    sizes = torch.tensor([sample.target.size for sample in samples], dtype=torch.float64)
    return (box_area(boxes) > WHOLE * sizes.prod(1)).double()


def _inner(sample: Sample[Objects], share: float) -> Tensor:
    """The centred box that takes a share of each side."""
    height, width = sample.target.size
    edges = torch.tensor([width, height, width, height], dtype=torch.float64)
    return edges * torch.tensor([1 - share, 1 - share, 1 + share, 1 + share], dtype=torch.float64) / 2
