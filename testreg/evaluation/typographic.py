"""Typographic attacks on a CLIP: a wrong word written on an image, and outliers moved onto it as the defence."""

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
from testreg.evaluation.figures import Panel, rows_of
from testreg.evaluation.labels import labelled_images
from testreg.evaluation.pixel_maps import one_split, two_splits
from testreg.evaluation.preparing import Normalisation, Square, normalisation_of
from testreg.evaluation.result import Result
from testreg.evaluation.samples import Sample, drawn, images_under, of_file
from testreg.neurons import AnyNeurons
from testreg.patching.steering import steered

if TYPE_CHECKING:
    from PIL.Image import Image

FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf")  # which come with matplotlib
COLOURS = ("white", "black", "red", "green", "blue", "yellow", "cyan", "magenta")
Kind = Literal["clean", "attacked", "painted", "boxed"]


@dataclass(frozen=True)
class Attack:
    """The true class of an image, and the class whose name is written on it."""

    label: int
    word: int
    text: str
    """What is written; "" if it is on the image already (RTA-100)."""
    seed: int


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
    """Typographic attacks: accuracy on clean and on attacked images, attack success, and both under defences.

    Accuracy is over all classes; an attack succeeds if the written word is nearer to the image than the true class.
    `*_painted`: the word is painted over with the mean colour of its box, a defence that needs no neurons.
    `*_defended`: in the patched variant, the register neurons fire on the word's patches and on no other, without a
    register. Both need to know where the word is: not so in RTA-100, where they are not defined.

    Args:
        data: RTA-100 (files label=X_text=Y.png), or labelled images, on which the name of another class is written.
        classes: a file with the name of a class a line, or "imagenet"; None for the names of the data.
        means: compare images with the mean embedding of each class of train, not with texts: for an image tower alone.
        size: side of the square that images are squashed to, and written on.
        tokenizer: from texts to what the model takes; None for the one that belongs to the model's name.
        settings: see `testreg.evaluation.evaluation.Settings`.
    """
    settings_ = Settings(**settings)
    known: list[Sample[int]] = []
    if rta := _rta(Path(data)):
        samples, names = rta
        if means:
            raise ValueError("RTA-100 has no photographs without words to take means of: leave means out (--means)")
    else:
        labelled = labelled_images(data)
        names = names_of(labelled, classes)
        asked = one_split(labelled.splits)
        if means:
            known, asked = two_splits(labelled.splits, data)
        samples = [_attacked(each, names, i, settings_.seed) for i, each in enumerate(asked)]
    samples = drawn(samples, settings_.num_images, settings_.seed)
    written = bool(samples[0].target.text)
    evaluation = Evaluation("typographic", model, data, settings_, neurons=neurons, against=against, image_size=size)
    if means:
        embeddings = _class_means(evaluation, drawn(known, settings_.num_images, settings_.seed), names, size)
    else:
        embeddings = texts_of(evaluation, names, open_clip.OPENAI_IMAGENET_TEMPLATES, tokenizer)
    kinds: tuple[Kind, ...] = ("clean", "attacked", "painted") if written else ("attacked",)
    shown = {kind: [_in_state(each, kind, size) for each in samples] for kind in kinds}
    none = torch.full((len(samples),), torch.nan)
    scores: dict[str, Scores] = {}
    guesses: dict[str, Tensor] = {}
    for variant in evaluation.variants:
        normalise = normalisation_of(variant.transform)
        texts = embeddings[variant.name]
        seen = {
            str(kind): evaluation.features(variant, each, Square(normalise, size), _embedded, {}).stacked("embedding")
            @ texts.T
            for kind, each in shown.items()
        }
        if variant.name == "patched" and written:
            boxed = [_in_state(each, "boxed", size) for each in samples]
            defended = evaluation.features(variant, boxed, WithBox(normalise, size), _steered, {"onto": "the word"})
            seen["defended"] = defended.stacked("embedding") @ texts.T
        label = torch.tensor([each.target.label for each in samples])
        word = torch.tensor([each.target.word for each in samples])
        metrics: dict[str, Metric] = {}
        for state in ("clean", "attacked", "painted", "defended"):
            logits = seen.get(state)
            metrics[f"accuracy_{state}"] = mean_of(none if logits is None else (logits.argmax(1) == label).double())
        for state in ("attacked", "painted", "defended"):
            logits = seen.get(state)
            won = none if logits is None else (_of(logits, word) > _of(logits, label)).double()
            metrics["attack_success" if state == "attacked" else f"attack_success_{state}"] = mean_of(won)
        scores[variant.name] = metrics
        guesses[variant.name] = seen["attacked"].argmax(1)

    def panels(i: int) -> list[Panel]:
        said = ", ".join(f"{name}: {names[int(each[i])]}" for name, each in guesses.items())
        images = [Panel(kind, np.asarray(each[i].open())) for kind, each in shown.items()]
        return [replace(panel, title=said) if panel.title == "attacked" else panel for panel in images]

    protocol = {
        "images": len(samples),
        "classes": len(names),
        "compared": "means of photographs" if means else "texts",
        "size": size,
        "words": "written" if written else "RTA",
    }
    return evaluation.result(
        scores, protocol, pictures={"attacks": lambda: rows_of(panels, len(samples), "typographic attacks")}
    )


def _of(logits: Tensor, numbers: Tensor) -> Tensor:
    return logits.gather(1, numbers[:, None])[:, 0]


def _rta(folder: Path) -> tuple[list[Sample[Attack]], list[str]] | None:
    """The images of RTA-100 in a folder, and its classes; None if it holds something else."""
    files = images_under(folder) if folder.is_dir() else []
    named = {file: file.stem.removeprefix("label=").split("_text=") for file in files if file.name.startswith("label=")}
    if not named:
        return None
    if bad := [file for file, parts in named.items() if len(parts) != 2 or not all(parts)]:
        raise ValueError(f"{bad[0]} is not named label=X_text=Y, as in RTA-100")
    names = sorted({part for parts in named.values() for part in parts})
    return [
        of_file(file, Attack(names.index(label), names.index(text), "", 0)) for file, (label, text) in named.items()
    ], names


def _class_means(
    evaluation: Evaluation, known: Sequence[Sample[int]], names: Sequence[str], size: int
) -> dict[str, Tensor]:
    """The mean embedding (classes, D), of length 1, of each class's photographs, by variant.

    Raises:
        ValueError: a class has no photograph.
    """
    labels = torch.tensor([each.target for each in known])
    if missing := set(range(len(names))) - set(labels.tolist()):
        raise ValueError(f"train has no photograph of {names[min(missing)]}: take more images (--num-images)")
    shown = [Sample(each.name, each.image, Attack(each.target, each.target, "", 0)) for each in known]
    clean = [_in_state(each, "clean", size) for each in shown]
    made: dict[str, Tensor] = {}
    for variant in evaluation.variants:
        prepare = Square(normalisation_of(variant.transform), size)
        embeddings = evaluation.features(variant, clean, prepare, _embedded, {}).stacked("embedding")
        means = torch.stack([embeddings[labels == number].mean(0) for number in range(len(names))])
        made[variant.name] = F.normalize(means, dim=-1)
    return made


def _attacked(sample: Sample[int], names: Sequence[str], number: int, seed: int) -> Sample[Attack]:
    """The sample with the name of another class, which is drawn at random."""
    if len(names) < 2:
        raise ValueError("an attack needs at least two classes")
    own = random.Random(f"{seed} {number}")
    word = own.choice([i for i in range(len(names)) if i != sample.target])
    return Sample(sample.name, sample.image, Attack(sample.target, word, names[word], own.randrange(2**32)))


@dataclass(frozen=True)
class _Shown(Sample[Attack]):
    """A sample whose image is squashed to a square, and attacked, or painted over."""

    kind: Kind = "clean"
    size: int = 224

    def open(self) -> Image:
        """The image as RGB; of the kind "boxed", the attacked one with an alpha of 0 where the word is."""
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


def _in_state(sample: Sample[Attack], kind: Kind, size: int) -> _Shown:
    target = sample.target
    name = f"{sample.name} {kind} {target.text} {target.seed} {size}"
    return _Shown(name, sample.image, target, kind, size)


def written_on(image: Image, text: str, seed: int) -> tuple[Image, tuple[int, int, int, int]]:
    """The image with a word on it, and the word's box: left, top, right, bottom.

    One of 3 fonts, 20 to 40 points at 224 pixels, 8 colours, a random place, a stroke of a pixel. Long words are made
    smaller until they fit.
    """
    import matplotlib
    from PIL import ImageDraw, ImageFont

    own, made = random.Random(seed), image.copy()
    draw = ImageDraw.Draw(made)
    font_file = Path(matplotlib.get_data_path(), "fonts", "ttf", own.choice(FONTS))
    points, colour = own.uniform(20, 40) * min(image.size) / 224, own.choice(COLOURS)
    while True:
        font = ImageFont.truetype(str(font_file), max(round(points), 1))
        left, top, right, bottom = (round(each) for each in draw.textbbox((0, 0), text, font, stroke_width=1))
        width, height = right - left, bottom - top
        if (width <= image.width and height <= image.height) or points <= 1:
            break
        points *= 0.8
    x, y = own.randint(0, max(image.width - width, 0)), own.randint(0, max(image.height - height, 0))
    stroke = "white" if colour == "black" else "black"
    draw.text((x - left, y - top), text, colour, font, stroke_width=1, stroke_fill=stroke)
    return made, (x, y, min(x + width, image.width), min(y + height, image.height))


@dataclass(frozen=True)
class WithBox:
    """The model's input (4, h, w) of an image with alpha: the fourth channel is 1 where the word is."""

    normalise: Normalisation
    size: int

    @property
    def key(self) -> str:
        return repr(self)

    def __call__(self, image: Image) -> Tensor:
        values = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
        return torch.cat([self.normalise(values[:3]), 1 - values[3:]])


def _embedded(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    return {"embedding": encode_images(variant, images)}


def _steered(variant: Variant, images: Tensor) -> Mapping[str, Tensor]:
    """Embeddings of images (B, 4, h, w) whose outliers are moved onto the patches that the word touches."""
    touched = F.max_pool2d(images[:, 3:], variant.tower.patch_size, variant.tower.patch_size)[:, 0] > 0
    with steered(variant.model, touched):
        return {"embedding": encode_images(variant, images[:, :3])}
