"""Models that see images and read texts: CLIP of open_clip and of transformers."""

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
"""Texts -> what the model's text tower takes: a tensor, or keyword arguments."""
TEXTS = 256  # texts that are read at a time


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of a model, by the name that it was loaded under.

    Raises:
        ValueError, OSError: the name is neither of open_clip nor of transformers, or has no tokenizer.
    """
    library, _, rest = name.partition(":")
    if library == "open_clip" or (Path(name) / "open_clip_config.json").is_file():
        import open_clip

        with explained(name, CHECK_HUB):
            local = f"local-dir:{name}" if library != "open_clip" else rest
            return open_clip.get_tokenizer(local if ":" in local else local.rpartition("/")[0])
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
    """The embeddings (classes, D) of the classes, by column; each model reads them once.

    Raises:
        ValueError: a model encodes no texts, or its tokenizer is not known.
    """
    for variant in evaluation.variants:
        if not any(hasattr(variant.model, each) for each in ("encode_text", "get_text_features")):
            raise ValueError(
                f"{type(variant.model).__name__} encodes no texts: this needs a whole CLIP, of open_clip or of "
                "transformers"
            )
    made: dict[int, Tensor] = {}
    for variant in evaluation.variants:
        if id(variant.model) not in made:
            reader = tokenizer or tokenizer_of(evaluation.name_of(variant))
            with variant.tower.evaluating():
                embeddings = class_embeddings(variant.model, reader, names, templates, variant.tower.device)
            made[id(variant.model)] = embeddings.cpu()
    return {variant.name: made[id(variant.model)] for variant in evaluation.variants}


def encode_images(variant: Variant, images: Tensor) -> Tensor:
    """The embeddings (B, D), of length 1, of images (B, 3, h, w)."""
    return F.normalize(embed_images(variant, images), dim=-1)


def embed_images(variant: Variant, images: Tensor) -> Tensor:
    """The embeddings (B, D) of images (B, 3, h, w), of any length; of an image tower alone, what it returns."""
    model: Any = variant.model
    images = images.to(variant.tower.device, variant.tower.dtype)
    encode = next(
        (getattr(model, name) for name in ("encode_image", "get_image_features") if hasattr(model, name)), model
    )
    return _embedding(encode(images))


@torch.no_grad()
def encode_texts(model: Any, tokenizer: Tokenizer, texts: list[str], device: torch.device) -> Tensor:
    """The embeddings (n, D), of length 1, of texts."""
    made = []
    for first in range(0, len(texts), TEXTS):
        tokens = tokenizer(texts[first : first + TEXTS])
        if hasattr(model, "encode_text"):
            made.append(_embedding(model.encode_text(tokens.to(device))))
        else:
            made.append(_embedding(model.get_text_features(**{name: each.to(device) for name, each in tokens.items()})))
    return F.normalize(torch.cat(made), dim=-1)


def _embedding(output: Any) -> Tensor:
    """The embedding in what a model returns: a tensor, or an output of transformers with one."""
    values: Tensor = getattr(output, "image_embeds", getattr(output, "pooler_output", output))
    return values.float()


def class_embeddings(
    model: Any,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Sequence[Callable[[str], str]],
    device: torch.device,
) -> Tensor:
    """The mean embedding (classes, D), of length 1, of each class's name in all templates."""
    texts = [template(name) for name in names for template in templates]
    embeddings = encode_texts(model, tokenizer, texts, device)
    return F.normalize(embeddings.unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def names_of(labelled: Labelled, classes: str | None) -> list[str]:
    """The names of the classes; those of ImageNet, as open_clip has them, for its 1,000 folders or for "imagenet"."""
    import open_clip

    synsets = (
        labelled.classes is not None and len(labelled.classes) == 1000 and all(n[0] == "n" for n in labelled.classes)
    )
    if classes == "imagenet" or (classes is None and synsets):
        return list(open_clip.IMAGENET_CLASSNAMES)
    return [name.replace("_", " ") for name in class_names(labelled, classes)]
