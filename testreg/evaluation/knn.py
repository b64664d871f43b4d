"""Classification by the nearest neighbours, as DINO and DINOv2 report it."""

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
from testreg.evaluation.samples import drawn
from testreg.neurons import AnyNeurons

QUERIES = 1024  # images that are compared with all of train at a time


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
    """Classification by the `k` nearest neighbours: top-1 and top-5 on val.

    Neighbours are those of largest cosine between the CLS tokens behind the final norm (the mean of the patches where
    there is no CLS), and vote for their class with weight exp(cosine / temperature).

    Args:
        data: an ImageFolder with train/ and val/, a folder of parquet files, or hf-dataset:NAME.
        k: neighbours that vote.
        temperature: how much less the farther ones count.
        size: side of the middle of the image that the model sees; the image's short side is 256 / 224 of it.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    splits = two_splits(labelled_images(data).splits, data)
    train, val = (drawn(samples, settings_.num_images, settings_.seed) for samples in splits)
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be between 1 and the {len(train)} images of train, got {k}")
    evaluation = Evaluation("knn", model, data, settings_, neurons=neurons, against=against, image_size=size)
    labels, truth = (torch.tensor([sample.target for sample in each]) for each in (train, val))
    scores: dict[str, Scores] = {}
    for variant in evaluation.variants:
        features = (global_features(evaluation, variant, each, size).stacked("cls")[:, 0] for each in (train, val))
        known, asked = (F.normalize(each, dim=-1) for each in features)
        votes = torch.cat([vote(part, known, labels, k, temperature) for part in asked.split(QUERIES)])
        scores[variant.name] = top_1_and_5(votes, truth)
    return evaluation.result(
        scores, {"train": len(train), "images": len(val), "k": k, "temperature": temperature, "size": size}
    )


def vote(asked: Tensor, known: Tensor, labels: Tensor, k: int, temperature: float) -> Tensor:
    """What `asked` (n, C) get for each class (n, classes) from their neighbours among `known` (m, C), of length 1."""
    similarity, nearest = (asked @ known.T).topk(k)
    weights = (similarity / temperature).softmax(-1)
    return torch.zeros(len(asked), int(labels.max()) + 1).scatter_add_(1, labels[nearest], weights)
