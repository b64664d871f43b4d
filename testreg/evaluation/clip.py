"""Embeds images and texts with a CLIP of open_clip or transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from testreg.evaluation.evaluation import Evaluation, Variant
from testreg.evaluation.labels import Labelled, class_names
from testreg.io.trust import CHECK_HUB, asking_only_if, explained

Tokenizer = Callable[[list[str]], Any]
"""Turns texts into the input of the model's text tower: a tensor, or a mapping of keyword arguments."""
TEXTS = 256  # texts in a batch


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of the model that `name` (see `testreg.load_model`) stands for.

    Raises:
        ValueError, OSError: the name is of neither open_clip nor transformers, or the model has no tokenizer.
    """
    library, _, rest = name.partition(":")
    if library == "open_clip" or (Path(name) / "open_clip_config.json").is_file():
        import open_clip

        with explained(name, CHECK_HUB):
            identifier = f"local-dir:{name}" if library != "open_clip" else rest
            return open_clip.get_tokenizer(identifier if ":" in identifier else identifier.rpartition("/")[0])
    source = rest if library == "hf" else name
    if library != "hf" and not Path(name).is_dir():
        raise ValueError(f"{name} reads no texts, or its tokenizer is not known: pass tokenizer=, or load it by name")
    from transformers import AutoTokenizer

    with explained(source, CHECK_HUB), asking_only_if(False):
        tokenizer = AutoTokenizer.from_pretrained(source)
    return lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")


def texts_of(
    evaluation: Evaluation, names: Sequence[str], templates: Sequence[Callable[[str], str]], tokenizer: Tokenizer | None
) -> dict[str, Tensor]:
    """{name of a variant: embeddings (classes, D)} of the classes. Variants of the same model share them.

    Raises:
        ValueError: a model encodes no texts, or its tokenizer is not known.
    """
    for variant in evaluation.variants:
        if not any(hasattr(variant.model, each) for each in ("encode_text", "get_text_features")):
            raise ValueError(
                f"{type(variant.model).__name__} encodes no texts: this needs a whole CLIP, of open_clip or of "
                "transformers"
            )
    embedded: dict[int, Tensor] = {}
    for variant in evaluation.variants:
        if id(variant.model) not in embedded:
            tokenizer_ = tokenizer or tokenizer_of(evaluation.name_of(variant))
            with variant.tower.evaluating():
                embeddings = class_embeddings(variant.model, tokenizer_, names, templates, variant.tower.device)
            embedded[id(variant.model)] = embeddings.cpu()
    return {variant.name: embedded[id(variant.model)] for variant in evaluation.variants}


def encode_images(variant: Variant, images: Tensor) -> Tensor:
    """The embeddings (B, D) of images (B, 3, h, w), scaled to length 1."""
    return F.normalize(embed_images(variant, images), dim=-1)


def embed_images(variant: Variant, images: Tensor) -> Tensor:
    """The embeddings (B, D) of images (B, 3, h, w), not normalised. A model that is no CLIP is just called."""
    model: Any = variant.model
    images = images.to(variant.tower.device, variant.tower.dtype)
    encode = next(
        (getattr(model, name) for name in ("encode_image", "get_image_features") if hasattr(model, name)), model
    )
    return _embedding(encode(images))


@torch.no_grad()
def encode_texts(model: Any, tokenizer: Tokenizer, texts: list[str], device: torch.device) -> Tensor:
    """The embeddings (n, D) of n texts, scaled to length 1."""
    embedded = []
    for first in range(0, len(texts), TEXTS):
        tokens = tokenizer(texts[first : first + TEXTS])
        if hasattr(model, "encode_text"):
            embedded.append(_embedding(model.encode_text(tokens.to(device))))
        else:
            embedded.append(
                _embedding(model.get_text_features(**{name: each.to(device) for name, each in tokens.items()}))
            )
    return F.normalize(torch.cat(embedded), dim=-1)


def _embedding(output: Any) -> Tensor:
    """The embeddings in a model's output, which is a tensor, or an output of transformers."""
    values: Tensor = getattr(output, "image_embeds", getattr(output, "pooler_output", output))
    return values.float()


def class_embeddings(
    model: Any,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
) -> Tensor:
    """The embeddings (classes, D) of classes: the mean over all templates, scaled to length 1."""
    texts = [template(name) for name in names for template in templates]
    embeddings = encode_texts(model, tokenizer, texts, device)
    return F.normalize(embeddings.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def names_of(labelled: Labelled, classes: str | None) -> list[str]:
    """The names of the classes, as `class_names` has them, with spaces instead of underscores.

    They are open_clip's names for ImageNet if `classes` is "imagenet", or if it is None and the data set has ImageNet's
    1,000 folders (n01440764, ...).
    """
    import open_clip

    is_imagenet = (
        labelled.classes is not None and len(labelled.classes) == 1000 and all(n[0] == "n" for n in labelled.classes)
    )
    if classes == "imagenet" or (classes is None and is_imagenet):
        return list(open_clip.IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in class_names(labelled, classes)]
