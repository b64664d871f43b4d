"""Classification by the k nearest neighbours, as in the evaluations of DINO and DINOv2."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from testreg.evaluation.bootstrap import Scores
from testreg.evaluation.classification import global_features, top_1_and_5
from testreg.evaluation.evaluation import Evaluation, Model, Settings
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.pixel_maps import two_splits
from testreg.evaluation.result import Result
from testreg.evaluation.samples import random_subset
from testreg.neurons import AnyNeurons

QUERIES = 1024  # images of val that are compared with all of train at a time, to limit memory


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    k: int = 20,
    temperature: float = 0.07,
    size: int = 224,
    **settings: Any,
) -> Result:
    """Classification by the `k` nearest neighbours: the top-1 and top-5 accuracy on val.

    The neighbours of an image are the images of train whose CLS token, after the final norm, has the largest cosine
    with its own (models without CLS: the mean of the patches). A neighbour votes for its class with a weight
    proportional to exp(cosine / temperature).

    Args:
        data: an ImageFolder with train/ and val/, a folder of parquet files, or hf-dataset:NAME.
        k: how many neighbours vote.
        temperature: the lower it is, the less do farther neighbours count.
        size: side of the model's input in pixels. The image is resized so that its short side is 256 / 224 of the size,
            and the middle is cropped.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    splits = two_splits(labelled_images(data).splits, data)
    train, val = (random_subset(samples, settings_.num_images, settings_.seed) for samples in splits)
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be between 1 and the {len(train)} images of train, got {k}")
    evaluation = Evaluation("knn", model, data, settings_, neurons=neurons, against=against, image_size=size)
    labels, truth = (torch.tensor([sample.target for sample in each]) for each in (train, val))
    scores: dict[str, Scores] = {}
    for variant in evaluation.variants:
        features = (global_features(evaluation, variant, each, size).stacked("cls")[:, 0] for each in (train, val))
        train_cls, val_cls = (F.normalize(each, dim=-1) for each in features)
        votes = torch.cat([vote(part, train_cls, labels, k, temperature) for part in val_cls.split(QUERIES)])
        scores[variant.name] = top_1_and_5(votes, truth)
    return evaluation.result(
        scores, {"train": len(train), "images": len(val), "k": k, "temperature": temperature, "size": size}
    )


def vote(queries: Tensor, neighbours: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """The weight (n, classes) that each class gets for each query.

    Args:
        queries: vectors (n, C) of length 1, to be classified.
        neighbours: vectors (m, C) of length 1.
        labels: the classes (m,) of the neighbours.
    """
    similarity, nearest = (queries @ neighbours.T).topk(k)
    weights = (similarity / temperature).softmax(-1)
    return torch.zeros(len(queries), int(labels.max()) + 1).scatter_add_(1, labels[nearest], weights)
