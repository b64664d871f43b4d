"""Typographic attacks on a CLIP: the name of a wrong class is written on an image, and the CLIP is misled by it.

The defence of Jiang et al. lets the register neurons fire on the patches of the word, which destroys what these patches
tell. (Register neurons: those that make outliers, the patches of huge norm.)
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from testreg.evaluation.bootstrap import Metric, Scores, mean_of
from testreg.evaluation.clip import Tokenizer, encode_images, names_of, texts_of
from testreg.evaluation.evaluation import Evaluation, Model, Settings, Variant
from testreg.evaluation.figures import Panel, picture_of_rows
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.pixel_maps import one_split, two_splits
from testreg.evaluation.preparing import Normalisation, Square, normalisation_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, images_under, random_subset, sample_of_file
from testreg.extensions.steering import steered
from testreg.neurons import AnyNeurons

if TYPE_CHECKING:
    from PIL.Image import Image

FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")  # which come with matplotlib
COLOURS = ("white", "black", "red", "green", "blue", "yellow", "cyan", "magenta")
Kind = Literal["clean", "attacked", "painted", "boxed"]
"""How an image is edited: not at all; the word is written; the word is written and painted over; the word is written,
and the alpha channel says where it is."""


@dataclass(frozen=True)
class Attack:
    """The truth of an attacked image."""

    label: int
    """The true class."""
    word: int
    """The class whose name is written on the image."""
    text: str
    """The text to write; "" if the image has it already (RTA-100), or is not to be attacked."""
    seed: int
    """Seed of the text's font, colour, size and place."""


def evaluate(
    model: Model,
    data: str | os.PathLike[str],
    *,
    neurons: AnyNeurons = None,
    against: Model | None = None,
    classes: str | None = None,
    means: bool = False,
    size: int = 224,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> Result:
    """Typographic attacks: the accuracy on clean and on attacked images, the attacks' success, and both with a defence.

    Accuracy is over all classes. An attack succeeds if the image's embedding has a larger cosine with the class of the
    written word than with the true class.
    `*_painted`: a defence without neurons, which paints over the word with the mean colour of its box.
    `*_defended`: only in the patched variant; no register is added, but the register neurons fire on the word's
    patches, and on no others.
    Both defences need to know where the word is. This is not known for RTA-100, so they are not defined there.

    Args:
        data: RTA-100 (files label=X_text=Y.png), or labelled images, on which the name of another class is written.
        classes: a file with one name of a class on each line, or "imagenet" for open_clip's names; None for the names
            of the data, or open_clip's if the data has ImageNet's 1,000 folders.
        means: compare images with the mean embedding of the class's images in train, not with texts. This is for models
            without a text tower.
        size: side of the square that images are squashed to before the word is written, in pixels.
        tokenizer: turns texts into the input of the model's text tower; None for the one that the model's name says.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    train: list[Sample[int]] = []
    if rta_100 := _rta_100(Path(data)):
        samples, names = rta_100
        if means:
            raise ValueError("RTA-100 has no photographs without words to take means of: leave means out (--means)")
    else:
        labelled = labelled_images(data)
        names = names_of(labelled, classes)
        attacked_split = one_split(labelled.splits)
        if means:
            train, attacked_split = two_splits(labelled.splits, data)
        samples = [_attacked(each, names, i, settings_.seed) for i, each in enumerate(attacked_split)]
    samples = random_subset(samples, settings_.num_images, settings_.seed)
    can_write = bool(samples[0].target.text)
    evaluation = Evaluation("typographic", model, data, settings_, neurons=neurons, against=against, image_size=size)
    if means:
        embeddings = _class_means(evaluation, random_subset(train, settings_.num_images, settings_.seed), names, size)
    else:
        embeddings = texts_of(evaluation, names, open_clip.OPENAI_IMAGENET_TEMPLATES, tokenizer)
    kinds: tuple[Kind, ...] = ("clean", "attacked", "painted") if can_write else ("attacked",)
    edited = {kind: [as_kind(each, kind, size) for each in samples] for kind in kinds}
    undefined = torch.full((len(samples),), torch.nan)
    scores: dict[str, Scores] = {}
    guesses: dict[str, Tensor] = {}
    for variant in evaluation.variants:
        normalise = normalisation_of(variant.transform)
        texts = embeddings[variant.name]
        logits_of = {
            str(kind): evaluation.features(variant, each, Square(normalise, size), _embedded, {}).stacked("embedding")
            @ texts.T
            for kind, each in edited.items()
        }
        if variant.name == "patched" and can_write:
            boxed = [as_kind(each, "boxed", size) for each in samples]
            defended = evaluation.features(variant, boxed, WithBox(normalise, size), _steered, {"onto": "the word"})
            logits_of["defended"] = defended.stacked("embedding") @ texts.T
        label = torch.tensor([each.target.label for each in samples])
        word = torch.tensor([each.target.word for each in samples])
        metrics: dict[str, Metric] = {}
        for state in ("clean", "attacked", "painted", "defended"):
            logits = logits_of.get(state)
            metrics[f"accuracy_{state}"] = mean_of(
                undefined if logits is None else (logits.argmax(1) == label).double()
            )
        for state in ("attacked", "painted", "defended"):
            logits = logits_of.get(state)
            won = undefined if logits is None else (_logit_of(logits, word) > _logit_of(logits, label)).double()
            metrics["attack_success" if state == "attacked" else f"attack_success_{state}"] = mean_of(won)
        scores[variant.name] = metrics
        guesses[variant.name] = logits_of["attacked"].argmax(1)

    def panels(i: int) -> list[Panel]:
        title = ", ".join(f"{name}: {names[int(each[i])]}" for name, each in guesses.items())
        images = [Panel(kind, np.asarray(each[i].open())) for kind, each in edited.items()]
        return [replace(panel, title=title) if panel.title == "attacked" else panel for panel in images]

    protocol = {
        "images": len(samples),
        "classes": len(names),
        "compared": "means of photographs" if means else "texts",
        "size": size,
        "words": "written" if can_write else "RTA",
    }
    return evaluation.result(
        scores, protocol, pictures={"attacks": lambda: picture_of_rows(panels, len(samples), "typographic attacks")}
    )


def _logit_of(logits: Tensor, numbers: Tensor) -> Tensor:
    """From logits (n, classes), one of each row: that of the class in `numbers` (n,)."""
    return logits.gather(1, numbers[:, None])[:, 0]


def _rta_100(folder: Path) -> tuple[list[Sample[Attack]], list[str]] | None:
    """The images of RTA-100 in a folder and the names of their classes; None if the folder is not RTA-100."""
    files = images_under(folder) if folder.is_dir() else []
    named = {file: file.stem.removeprefix("label=").split("_text=") for file in files if file.name.startswith("label=")}
    if not named:
        return None
    if bad := [file for file, parts in named.items() if len(parts) != 2 or not all(parts)]:
        raise ValueError(f"{bad[0]} is not named label=X_text=Y, as in RTA-100")
    names = sorted({part for parts in named.values() for part in parts})
    return [
        sample_of_file(file, Attack(names.index(label), names.index(text), "", 0))
        for file, (label, text) in named.items()
    ], names


def _class_means(
    evaluation: Evaluation, train: Sequence[Sample[int]], names: Sequence[str], size: int
) -> dict[str, Tensor]:
    """{name of a variant: the mean embedding of each class's images in train, (classes, D), scaled to length 1}.

    Raises:
        ValueError: a class has no image.
    """
    labels = torch.tensor([each.target for each in train])
    if missing := set(range(len(names))) - set(labels.tolist()):
        raise ValueError(f"train has no photograph of {names[min(missing)]}: take more images (--num-images)")
    unattacked = [Sample(each.name, each.image, Attack(each.target, each.target, "", 0)) for each in train]
    clean = [as_kind(each, "clean", size) for each in unattacked]
    class_means: dict[str, Tensor] = {}
    for variant in evaluation.variants:
        prepare = Square(normalisation_of(variant.transform), size)
        embeddings = evaluation.features(variant, clean, prepare, _embedded, {}).stacked("embedding")
        means = torch.stack([embeddings[labels == number].mean(0) for number in range(len(names))])
        class_means[variant.name] = F.normalize(means, dim=-1)
    return class_means


def _attacked(sample: Sample[int], names: Sequence[str], number: int, seed: int) -> Sample[Attack]:
    """The sample as an attack with the name of another class, which is drawn at random."""
    if len(names) < 2:
        raise ValueError("an attack needs at least two classes")
    generator = random.Random(f"{seed} {number}")
    word = generator.choice([i for i in range(len(names)) if i != sample.target])
    return Sample(sample.name, sample.image, Attack(sample.target, word, names[word], generator.randrange(2**32)))


@dataclass(frozen=True)
class _EditedSample(Sample[Attack]):
    """A sample whose image is squashed to a square and edited when it is opened."""

    kind: Kind = "clean"
    size: int = 224

    def open(self) -> Image:
        """The image as RGB; for the kind "boxed" as RGBA, with an alpha of 0 where the word is."""
        from PIL import Image

        image = super().open().resize((self.size, self.size), Image.Resampling.BICUBIC)
        if self.kind == "clean" or not self.target.text:
            return image
        image, box = written_on(image, self.target.text, self.target.seed)
        if self.kind == "painted":
            left, top, right, bottom = box
            mean = np.asarray(image)[top:bottom, left:right].mean((0, 1))
            image.paste(tuple(round(each) for each in mean.tolist()), box)
        if self.kind == "boxed":
            alpha = Image.new("L", image.size, 255)
            alpha.paste(0, box)
            image.putalpha(alpha)
        return image


def as_kind(sample: Sample[Attack], kind: Kind, size: int) -> _EditedSample:
    """The sample with its image edited as `kind` says, under a name of its own in the cache."""
    target = sample.target
    name = f"{sample.name} {kind} {target.text} {target.seed} {size}"
    return _EditedSample(name, sample.image, target, kind, size)


def written_on(image: Image, text: str, seed: int) -> tuple[Image, tuple[int, int, int, int]]:
    """The image with a word written on it, and the word's box: left, top, right, bottom in pixels.

    The font (one of 3), the size (20 to 40 points for 224 pixels), the colour (one of 8) and the place are random. The
    letters have an outline of one pixel. Words that are too long are written smaller.
    """
    import matplotlib
    from PIL import ImageDraw, ImageFont

    generator, result = random.Random(seed), image.copy()
    draw = ImageDraw.Draw(result)
    font_file = Path(matplotlib.get_data_path(), "fonts", "ttf", generator.choice(FONTS))
    points, colour = generator.uniform(20, 40) * min(image.size) / 224, generator.choice(COLOURS)
    while True:
        font = ImageFont.truetype(str(font_file), max(round(points), 1))
        left, top, right, bottom = (round(each) for each in draw.textbbox((0, 0), text, font, stroke_width=1))
        width, height = right - left, bottom - top
        if (width <= image.width and height <= image.height) or points <= 1:
            break
        points *= 0.8
    x, y = generator.randint(0, max(image.width - width, 0)), generator.randint(0, max(image.height - height, 0))
    stroke = "white" if colour == "black" else "black"
    draw.text((x - left, y - top), text, colour, font, stroke_width=1, stroke_fill=stroke)
    return result, (x, y, min(x + width, image.width), min(y + height, image.height))


@dataclass(frozen=True)
class WithBox:
    """Preparation that turns an RGBA image into (4, h, w): the normalised colours, and 1 where the word is, else 0."""

    normalise: Normalisation
    size: int

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        values = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
        return torch.cat([self.normalise(values[:3]), 1 - values[3:]])


def _embedded(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """The embeddings of images."""
    return {"embedding": encode_images(variant, images)}


def _steered(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """The embeddings of images (B, 4, h, w), see `WithBox`, while register neurons fire only on patches of the word."""
    touched = F.max_pool2d(images[:, 3:], variant.tower.patch_size, variant.tower.patch_size)[:, 0] > 0
    with steered(variant.model, touched):
        return {"embedding": encode_images(variant, images[:, :3])}
