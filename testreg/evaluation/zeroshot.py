"""Zero-shot classification with a CLIP, as open_clip reports it."""

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
from testreg.evaluation.samples import drawn
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
    """Zero-shot classification: top-1 and top-5, by the cosine of an image with the mean text of each class.

    Activations are those that the weights were trained with (QuickGELU for OpenAI's alone): the released code of Jiang
    et al. forces QuickGELU on all.

    Args:
        data: an ImageFolder, parquet files, or hf-dataset:NAME; of two splits val counts.
        classes: a file with the name of a class a line, or "imagenet" for open_clip's; None for the names of the data.
            The 1,000 folders of ImageNet have open_clip's names by themselves.
        templates: open_clip's 80 for ImageNet ("openai"), or its 7 ("simple").
        tokenizer: from texts to what the model takes; None for the one that belongs to the model's name.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    import open_clip

    settings_ = Settings(**settings)
    labelled = labelled_images(data)
    names = names_of(labelled, classes)
    samples = drawn(one_split(labelled.splits), settings_.num_images, settings_.seed)
    sentences = {"openai": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple": open_clip.SIMPLE_IMAGENET_TEMPLATES}[
        templates
    ]
    evaluation = Evaluation("zeroshot", model, data, settings_, neurons=neurons, against=against)
    texts = texts_of(evaluation, names, sentences, tokenizer)
    truth = torch.tensor([sample.target for sample in samples])
    scores: dict[str, Scores] = {}
    for variant in evaluation.variants:
        seen = evaluation.features(variant, samples, None, features, {}).stacked("embedding")
        scores[variant.name] = top_1_and_5(seen @ texts[variant.name].T, truth)
    return evaluation.result(scores, {"images": len(samples), "classes": len(names), "templates": templates})


def features(variant: Variant, images: Tensor) -> dict[str, Tensor]:
    return {"embedding": encode_images(variant, images)}
