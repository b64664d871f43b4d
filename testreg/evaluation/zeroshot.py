"""Zero-shot classification with a CLIP, as in open_clip's evaluation."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import Tensor

from testreg.evaluation.bootstrap import Scores
from testreg.evaluation.classification import top_1_and_5
from testreg.evaluation.clip import Tokenizer, encode_images, names_of, texts_of
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.pixel_maps import one_split
from testreg.evaluation.result import Result
from testreg.evaluation.samples import random_subset
from testreg.neurons import AnyNeurons


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    classes: str | None = None,
    templates: Literal["openai", "simple"] = "openai",
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> Result:
    """Zero-shot classification: top-1 and top-5 accuracy.

    The classes of an image are ranked by the cosine of its embedding with the mean embedding of the class's texts.
    Each model keeps the activation function that it was trained with (QuickGELU for OpenAI's weights only), while the
    released code of Jiang et al. uses QuickGELU for all models.

    Args:
        data: an ImageFolder, parquet files, or hf-dataset:NAME; if there are two splits, val is used.
        classes: a file with one name of a class on each line, or "imagenet" for open_clip's names; None for the names
            of the data, or open_clip's if the data has ImageNet's 1,000 folders.
        templates: sentences in which the names are put: open_clip's 80 for ImageNet ("openai"), or its 7 ("simple").
        tokenizer: turns texts into the input of the model's text tower; None for the one that the model's name says.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    import open_clip

    settings_ = Settings(**settings)
    labelled = labelled_images(data)
    names = names_of(labelled, classes)
    samples = random_subset(one_split(labelled.splits), settings_.num_images, settings_.seed)
    sentences = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}[
        templates
    ]
    evaluation = Evaluation("zeroshot", model, data, settings_, neurons=neurons, against=against)
    texts = texts_of(evaluation, names, sentences, tokenizer)
    truth = torch.tensor([sample.target for sample in samples])
    scores: dict[str, Scores] = {}
    for variant in evaluation.variants:
        embeddings = evaluation.features(variant, samples, None, features, {}).stacked("embedding")
        scores[variant.name] = top_1_and_5(embeddings @ texts[variant.name].T, truth)
    return evaluation.result(scores, {"images": len(samples), "classes": len(names), "templates": templates})


def features(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    """The images' embeddings (B, D), of length 1."""
    return {"embedding": encode_images(variant, images)}
