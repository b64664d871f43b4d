"""What single tokens know: where they are, what they show, and what is in the image (arXiv 2309.16588, section 2)."""

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
from testreg.evaluation.samples import Sample, drawn
from testreg.measure.hooks import recorded_tokens
from testreg.measure.outliers import OutlierRule
from testreg.measure.tokens import behind_norm, global_token
from testreg.neurons import AnyNeurons
from testreg.register import registers

KINDS = ("normal", "outlier")
VALIDATION = 5  # one image of so many of train chooses C


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
    """What single tokens know of their position, their pixels and the image's class, by linear models.

    `position_*`: share of tokens whose position is predicted, and `distance_*`, how many patches off they are on
    average; `pixels_*`: the L2 error of a token's pixels, normalised; `class_*`: accuracy of a logistic regression on
    one token of an image: CLS, a random normal patch, a random outlier, or the register (the test-time one, or the
    first trained one). All are scored on val. Outliers are those of the plain model, so that all columns are scored at
    the same patches; where there are none, their metrics are not defined.

    Args:
        data: an ImageFolder with train/ and val/, a folder of parquet files, or hf-dataset:NAME.
        block: the block after which tokens are taken, behind the final norm; outliers are judged before it.
        size: side of the square that images are squashed to.
        threshold: norm above which a token is an outlier (DINOv2-g: 150); None for the rule that adapts to the model.
        choices: how often the tokens are chosen at random: metrics are means, and details have the spread.
        num_c: values of C from 1e-6 to 1e5 that are tried, on a fifth of train.
        epochs: times that the linear model of positions sees the patches of train.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    splits = two_splits(labelled_images(data).splits, data)
    train, val = (drawn(samples, settings_.num_images, settings_.seed) for samples in splits)
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
        if not outliers:  # of the plain model, which comes first
            outliers = [(norms := each.stacked("norms")) > rule.limit(norms) for each in features]
        if outliers[0].shape[1] != features[0][0]["patches"].shape[0]:
            raise ValueError(
                f"{evaluation.against_name} has other patches than {evaluation.model_name}: tokens cannot be compared"
            )
        metrics = {**position(features, outliers, epochs, settings_.seed), **pixels(features, outliers)}
        known, spread[variant.name] = classes(features, outliers, (train, val), choices, num_c, settings_.seed)
        scores[variant.name] = metrics | known
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
    def compute(variant: Variant, images: Tensor) -> dict[str, Tensor]:
        """Of images: norms (B, N), patches (B, N, C), their pixels (B, N, 3 p p), CLS and register (B, C)."""
        tower = variant.tower
        with ExitStack() as stack:
            last = stack.enter_context(recorded_tokens(tower, images, block))
            states = stack.enter_context(registers(variant.model)) if variant.patch is not None else []
            tower.run(images)
        where, tokens = tower.patches(images), behind_norm(tower, last[0]).float()
        made = {
            "norms": last[0][:, where].float().norm(dim=-1),
            "patches": tokens[:, where].half(),
            "pixels": F.unfold(images, tower.patch_size, stride=tower.patch_size).transpose(1, 2).half(),
            "cls": global_token(tokens, tower),
        }
        if states:
            made["register"] = behind_norm(tower, states[block][:, :1])[:, 0].float()
        elif tower.num_prefix > 1:
            made["register"] = tokens[:, 1]
        return made

    return compute


def position(features: Sequence[Features], outliers: Sequence[Tensor], epochs: int, seed: int) -> Scores:
    """How well a linear classifier says where a patch is."""
    known, asked = (each.stacked("patches").float() for each in features)
    count = known.shape[1]
    mean, std = known.mean((0, 1)), known.std((0, 1)).clamp(min=1e-6)
    known, asked = (known - mean) / std, (asked - mean) / std
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(known.shape[2], count)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
        tokens, places = known.flatten(0, 1), torch.arange(count).repeat(len(known))
        for _ in range(epochs):
            for chosen in torch.randperm(len(tokens)).split(1024):
                optimizer.zero_grad()
                F.cross_entropy(head(tokens[chosen]), places[chosen]).backward()
                optimizer.step()
        guess = head(asked).argmax(-1)  # (n, N)
    truth = torch.arange(count).expand_as(guess)
    side = round(count**0.5)  # images are squares
    rows, columns = (guess // side - truth // side).double(), (guess % side - truth % side).double()
    values = {"position": (guess == truth).double(), "distance": torch.hypot(rows, columns)}
    return {f"{name}_{kind}": _over(each, outliers[1], kind) for name, each in values.items() for kind in KINDS}


def pixels(features: Sequence[Features], outliers: Sequence[Tensor]) -> Scores:
    """How well a ridge regression says the pixels of a patch."""
    (known, asked), (targets, truth) = (
        [each.stacked(name).float() for each in features] for name in ("patches", "pixels")
    )
    inputs, outputs = (F.pad(known.flatten(0, 1), (0, 1), value=1.0).double(), targets.flatten(0, 1).double())
    gram = inputs.T @ inputs + len(inputs) * 1e-4 * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, inputs.T @ outputs)
    error = (F.pad(asked, (0, 1), value=1.0).double() @ weights - truth.double()).norm(dim=-1)  # (n, N)
    return {f"pixels_{kind}": _over(error, outliers[1], kind) for kind in KINDS}


def _over(values: Tensor, outlier: Tensor, kind: str) -> Metric:
    """The mean of values (n, N) over the normal patches or over the outliers."""
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
    """The accuracy from one token of an image, by its kind, and its standard deviation over the choices of token."""
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
    """A token (n, C) of each image, NaN where it has none of that kind."""
    if kind not in KINDS:
        return features.stacked(kind).numpy() if kind in features[0] else np.full((len(features), 1), np.nan)
    patches = features.stacked("patches").float()
    drawn_ = torch.rand(outlier.shape, generator=random).masked_fill(outlier ^ (kind == "outlier"), -1).max(1)
    chosen = patches[torch.arange(len(patches)), drawn_.indices]
    return chosen.masked_fill((drawn_.values < 0)[:, None], torch.nan).numpy()


def _accuracy(tokens: Sequence[Array], labels: Sequence[Array], num_c: int) -> Array:
    """Whether each image of val is classified rightly (n,), NaN where it has no token, or too few of train have one."""
    has = [np.isfinite(each).all(1) for each in tokens]
    x, y = tokens[0][has[0]], labels[0][has[0]]
    held = np.arange(len(x)) % VALIDATION == 0
    right = np.full(len(tokens[1]), np.nan)
    if not has[1].any() or len(set(y[~held])) < 2 or not held.any():
        return right
    scaler = library("sklearn.preprocessing").StandardScaler().fit(x)
    regression = library("sklearn.linear_model").LogisticRegression
    x = scaler.transform(x)
    fitted = [regression(C=c, max_iter=1000).fit(x[~held], y[~held]) for c in np.logspace(-6, 5, num_c)]
    best = max(fitted, key=lambda each: each.score(x[held], y[held]))
    final = regression(C=best.C, max_iter=1000).fit(x, y)
    right[has[1]] = final.predict(scaler.transform(tokens[1][has[1]])) == labels[1][has[1]]
    return right
