"""What a single token tells a linear model: its position, its pixels, the image's class (arXiv 2309.16588, section 2).

It compares kinds of tokens: normal patches, outliers (patches of exceptionally large norm), CLS, and a register.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from testreg.evaluation.bootstrap import Array, Metric, Scores, mean_of, ratio_of
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.features import Features
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.libraries import library
from testreg.evaluation.pixel_maps import two_splits
from testreg.evaluation.preparing import Square, normalisation_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, random_subset
from testreg.measure.hooks import recorded_tokens
from testreg.measure.outliers import OutlierRule
from testreg.measure.tokens import behind_norm, global_token
from testreg.neurons import AnyNeurons
from testreg.register import registers

KINDS = ("normal", "outlier")  # kinds of patches
VALIDATION = 5  # one in so many images of train is held out, to choose C, the regularisation of the logistic regression


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    block: int = -1,
    size: int = 224,
    threshold: float | None = None,
    choices: int = 3,
    num_c: int = 45,
    epochs: int = 20,
    **settings: Any,
) -> Result:
    """What linear models predict from single tokens: the token's position, its pixels, and the image's class.

    In the names of metrics, `*` is the kind of token: normal or outlier, and for `class_*` also cls or register.

    `position_*` is the share of patches whose position is predicted, and `distance_*` the mean distance, in patches, of
    the predicted from the true position. `pixels_*` is the L2 error of the predicted pixels of a patch, after
    normalisation. `class_*` is the accuracy of a logistic regression on one token of an image: CLS, a random normal
    patch, a random outlier, or a register (the first test-time one; in models without, the second prefix token, e.g. a
    trained register). All are measured on val.

    For all variants, outliers are the patches that are outliers in the plain model, so that the same patches are
    compared. If there are none, their metrics are not defined.

    Args:
        data: an ImageFolder with train/ and val/, a folder of parquet files, or hf-dataset:NAME.
        block: the block after which tokens are taken. Linear models read them after the final norm; outliers are told
            by their norm before it.
        size: side of the square that images are squashed to, in pixels.
        threshold: norm above which a token is an outlier (DINOv2-g: 150); None for the rule that adapts to the model.
        choices: how often a random patch is chosen in each image, for `class_normal` and `class_outlier`. They are
            means over these choices, and the result's details have the standard deviations.
        num_c: how many values of C (regularisation) from 1e-6 to 1e5 are compared, on a held-out fifth of train.
        epochs: how often the linear model of positions sees the patches of train.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    splits = two_splits(labelled_images(data).splits, data)
    train, val = (random_subset(samples, settings_.num_images, settings_.seed) for samples in splits)
    if len(train) <= VALIDATION or len({sample.target for sample in train}) < 2:
        raise ValueError(f"train needs at least {VALIDATION + 1} images and two classes, has {len(train)} images")
    rule = OutlierRule(threshold=threshold)
    evaluation = Evaluation("tokens", model, data, settings_, neurons=neurons, against=against, image_size=size)
    scores: dict[str, Scores] = {}
    spread: dict[str, Mapping[str, float]] = {}
    outliers: list[Tensor] = []
    for variant in evaluation.variants:
        prepare = Square(normalisation_of(variant.transform), size)
        features = [
            evaluation.features(variant, each, prepare, _tokens_after(block), {"block": block}) for each in (train, val)
        ]
        if not outliers:  # only for the first variant, which is the plain model
            outliers = [(norms := each.stacked("norms")) > rule.limit(norms) for each in features]
        if outliers[0].shape[1] != features[0][0]["patches"].shape[0]:
            raise ValueError(
                f"{evaluation.against_name} has other patches than {evaluation.model_name}: tokens cannot be compared"
            )
        metrics = {**position(features, outliers, epochs, settings_.seed), **pixels(features, outliers)}
        class_metrics, spread[variant.name] = classes(features, outliers, (train, val), choices, num_c, settings_.seed)
        scores[variant.name] = metrics | class_metrics
    return evaluation.result(
        scores,
        {
            "train": len(train),
            "images": len(val),
            "block": block,
            "size": size,
            "outliers": rule.describe(),
            "outlier_fraction": float(outliers[1].double().mean()),
            "choices": choices,
            "num_c": num_c,
            "epochs": epochs,
        },
        details={"class_spread": spread},
    )


def _tokens_after(block: int) -> Any:
    """A function that computes a variant's tokens after a block."""

    def compute(variant: Variant, images: Tensor) -> dict[str, Tensor]:
        """For N patches of p x p pixels: "norms" (B, N), "patches" (B, N, C), "pixels" (B, N, 3 p p), "cls" (B, C).

        "register" (B, C) is there only if the variant has a test-time register, or more than one prefix token.
        """
        tower = variant.tower
        with ExitStack() as stack:
            recorded = stack.enter_context(recorded_tokens(tower, images, block))
            register_states = stack.enter_context(registers(variant.model)) if variant.patch is not None else []
            tower.run(images)
        where, tokens = tower.patches(images), behind_norm(tower, recorded[0]).float()
        tensors = {
            "norms": recorded[0][:, where].float().norm(dim=-1),
            "patches": tokens[:, where].half(),
            "pixels": F.unfold(images, tower.patch_size, stride=tower.patch_size).transpose(1, 2).half(),
            "cls": global_token(tokens, tower),
        }
        if register_states:
            tensors["register"] = behind_norm(tower, register_states[block][:, :1])[:, 0].float()
        elif tower.num_prefix > 1:
            tensors["register"] = tokens[:, 1]
        return tensors

    return compute


def position(features: Sequence[Features], outliers: Sequence[Tensor], epochs: int, seed: int) -> Scores:
    """How well a linear classifier predicts the position of a patch.

    Args:
        features: of train and of val.
        outliers: which patches are outliers, (n, N), in train and in val.
    """
    train_tokens, val_tokens = (each.stacked("patches").float() for each in features)
    count = train_tokens.shape[1]
    mean, std = train_tokens.mean((0, 1)), train_tokens.std((0, 1)).clamp(min=1e-6)
    train_tokens, val_tokens = (train_tokens - mean) / std, (val_tokens - mean) / std
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(train_tokens.shape[2], count)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        tokens, places = train_tokens.flatten(0, 1), torch.arange(count).repeat(len(train_tokens))
        for _ in range(epochs):
            for chosen in torch.randperm(len(tokens)).split(1024):
                optimizer.zero_grad()
                F.cross_entropy(head(tokens[chosen]), places[chosen]).backward()
                optimizer.step()
        guess = head(val_tokens).argmax(-1)  # (n, N)
    truth = torch.arange(count).expand_as(guess)
    side = round(count**0.5)  # patches in a row: images are squares
    rows, columns = (guess // side - truth // side).double(), (guess % side - truth % side).double()
    values = {"position": (guess == truth).double(), "distance": torch.hypot(rows, columns)}
    return {
        f"{name}_{kind}": _mean_over_kind(each, outliers[1], kind) for name, each in values.items() for kind in KINDS
    }


def pixels(features: Sequence[Features], outliers: Sequence[Tensor]) -> Scores:
    """How well a ridge regression predicts the pixels of a patch. The arguments are those of `position`."""
    (train_tokens, val_tokens), (train_pixels, val_pixels) = (
        [each.stacked(name).float() for each in features] for name in ("patches", "pixels")
    )
    inputs, outputs = (
        F.pad(train_tokens.flatten(0, 1), (0, 1), value=1.0).double(),
        train_pixels.flatten(0, 1).double(),
    )
    gram = inputs.T @ inputs + len(inputs) * 1e-4 * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, inputs.T @ outputs)
    error = (F.pad(val_tokens, (0, 1), value=1.0).double() @ weights - val_pixels.double()).norm(dim=-1)  # (n, N)
    return {f"pixels_{kind}": _mean_over_kind(error, outliers[1], kind) for kind in KINDS}


def _mean_over_kind(values: Tensor, outlier: Tensor, kind: str) -> Metric:
    """The mean of `values` (n, N) over all patches of a kind; `outlier` (n, N) says which patches are outliers."""
    chosen = outlier if kind == "outlier" else ~outlier
    return ratio_of((values * chosen).sum(1), chosen.sum(1))


def classes(
    features: Sequence[Features],
    outliers: Sequence[Tensor],
    samples: Sequence[Sequence[Sample[int]]],
    choices: int,
    num_c: int,
    seed: int,
) -> tuple[dict[str, Metric], dict[str, float]]:
    """{"class_KIND": accuracy of a logistic regression on one token of that kind}, and the standard deviations.

    The standard deviation is over the random choices of the token, of which there are `choices`.
    """
    labels = [np.array([sample.target for sample in each]) for each in samples]
    metrics, spread = {}, {}
    for kind in ("cls", *KINDS, "register"):
        right = []
        for choice in range(choices if kind in KINDS else 1):
            random = torch.Generator().manual_seed(seed + choice)
            tokens = [_one_token(each, mask, kind, random) for each, mask in zip(features, outliers, strict=True)]
            right.append(_accuracy(tokens, labels, num_c))
        metrics[f"class_{kind}"] = mean_of(np.mean(right, axis=0))
        spread[f"class_{kind}"] = float(np.std([mean_of(each).value for each in right]))
    return metrics, spread


def _one_token(features: Features, outlier: Tensor, kind: str, random: torch.Generator) -> Array:
    """One token of a kind from each image, (n, C); NaN for images that have none."""
    if kind not in KINDS:
        return features.stacked(kind).numpy() if kind in features[0] else np.full((len(features), 1), np.nan)
    patches = features.stacked("patches").float()
    priority = torch.rand(outlier.shape, generator=random).masked_fill(outlier ^ (kind == "outlier"), -1).max(1)
    chosen = patches[torch.arange(len(patches)), priority.indices]
    return chosen.masked_fill((priority.values < 0)[:, None], torch.nan).numpy()


def _accuracy(tokens: Sequence[Array], labels: Sequence[Array], num_c: int) -> Array:
    """Which images of val are classified correctly, (n,): 1, 0, or NaN if the image has no token (NaN in `tokens`).

    All are NaN if so few images of train have a token that nothing can be fitted. Arguments are for train and val.
    """
    has_token = [np.isfinite(each).all(1) for each in tokens]
    x, y = tokens[0][has_token[0]], labels[0][has_token[0]]
    is_held_out = np.arange(len(x)) % VALIDATION == 0
    right = np.full(len(tokens[1]), np.nan)
    if not has_token[1].any() or len(set(y[~is_held_out])) < 2 or not is_held_out.any():
        return right
    scaler = library("sklearn.preprocessing").StandardScaler().fit(x)
    regression = library("sklearn.linear_model").LogisticRegression
    x = scaler.transform(x)
    fitted = [regression(C=c, max_iter=1000).fit(x[~is_held_out], y[~is_held_out]) for c in np.logspace(-6, 5, num_c)]
    best = max(fitted, key=lambda each: each.score(x[is_held_out], y[is_held_out]))
    final = regression(C=best.C, max_iter=1000).fit(x, y)
    right[has_token[1]] = final.predict(scaler.transform(tokens[1][has_token[1]])) == labels[1][has_token[1]]
    return right
