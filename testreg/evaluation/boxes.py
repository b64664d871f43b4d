"""Reads data sets of images with boxes around objects: Pascal VOC and COCO."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from testreg.evaluation.samples import Sample, is_turned, sample_of_file, size_of
from testreg.files import plain, read_text
from testreg.io.decoding import FORMATS

if TYPE_CHECKING:
    from PIL.Image import Image

LAYOUTS = (
    "VOC (JPEGImages/, Annotations/*.xml) or COCO (annotations/instances_SPLIT.json, images in SPLIT/ or images/SPLIT/)"
)


@dataclass(frozen=True)
class Objects:
    """The true boxes of the objects in an image."""

    boxes: Tensor
    """(n, 4) float64: left, top, right, bottom in pixels."""
    size: tuple[int, int]
    """Height and width of the image."""


def boxed_images(data: str | os.PathLike[str], names: str | os.PathLike[str] | None = None) -> list[Sample[Objects]]:
    """The images of a data set that have at least one box, with all their boxes.

    VOC: difficult and truncated objects are included; coordinates, which start at 1 in VOC, are made to start at 0, and
    the right and bottom edges to lie behind the last pixel. COCO: crowds are left out; all files
    annotations/instances_*.json are read.

    Args:
        data: the folder of the data set.
        names: a file that lists the images to take, one name on each line; folders and suffixes in it are ignored. For
            COCO20k, take the 19,817 names that come with LOST. None takes VOC's ImageSets/Main/trainval.txt if it
            exists, and otherwise all images.

    Raises:
        FileNotFoundError: there is no such folder, image, annotation or list.
        ValueError: the layout is not known, an annotation is not valid, or no image has a box.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}: boxes are read from {LAYOUTS}")
    if (folder / "JPEGImages").is_dir():
        default_list = folder / "ImageSets" / "Main" / "trainval.txt"
        chosen = _names_in_list(Path(names) if names is not None else default_list if default_list.is_file() else None)
        samples = _voc(folder, chosen)
    elif files := sorted((folder / "annotations").glob("instances_*.json")):
        chosen = _names_in_list(None if names is None else Path(names))
        pairs = [pair for file in files for pair in _coco(folder, file, chosen)]
        if missing := (chosen or set()) - {stem for stem, _ in pairs}:
            raise ValueError(f"{names} names {plain(min(missing))}, which has no annotations in {folder}")
        samples = [sample for _, sample in pairs]
    else:
        raise ValueError(f"{folder} has no boxes: they are read from {LAYOUTS}")
    samples = [sample for sample in samples if len(sample.target.boxes)]
    if not samples:
        raise ValueError(f"no image in {folder} has a box")
    return samples


def _names_in_list(file: Path | None) -> set[str] | None:
    """The first word of each line of a list, without folder and suffix. (VOC's lists have more words on a line.)"""
    if file is None:
        return None
    names = {Path(line.split()[0]).stem for line in read_text(file).splitlines() if line.strip()}
    if not names:
        raise ValueError(f"{file} names no image: write one a line")
    return names


def _voc(folder: Path, chosen: set[str] | None) -> list[Sample[Objects]]:
    """The chosen images (their names without suffix; None for all) of VOC, with their boxes."""
    images = {path.stem: path for path in sorted((folder / "JPEGImages").iterdir()) if path.suffix.lower() == ".jpg"}
    stems = sorted(images) if chosen is None else sorted(chosen)
    samples = []
    for stem in stems:
        file = folder / "Annotations" / f"{stem}.xml"
        if stem not in images:
            raise FileNotFoundError(f"there is no image {folder / 'JPEGImages' / plain(stem)}.jpg")
        if not file.is_file():
            raise FileNotFoundError(f"{images[stem]} has no annotations: there is no file {file}")
        samples.append(_annotated(images[stem], _voc_objects(file), file))
    return samples


def _voc_objects(file: Path) -> Objects:
    """The boxes in an annotation file of VOC."""
    try:
        root = ElementTree.fromstring(read_text(file))
        size = (int(root.findtext("size/height", "")), int(root.findtext("size/width", "")))
        boxes = [[float(each.findtext(f"bndbox/{edge}", "")) for edge in _EDGES] for each in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file} is not an annotation of Pascal VOC: {error}") from None
    return Objects(_boxes_tensor(boxes, str(file)) - torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), size)


_EDGES = ("xmin", "ymin", "xmax", "ymax")


def _coco(folder: Path, file: Path, chosen: set[str] | None) -> list[tuple[str, Sample[Objects]]]:
    """The chosen images in one file annotations/instances_*.json, as (name without suffix, sample)."""
    split = file.stem.removeprefix("instances_")
    try:
        data = json.loads(read_text(file))
        images = {each["id"]: each for each in data["images"]}
        boxes: dict[Any, list[list[float]]] = {number: [] for number in images}
        for each in data["annotations"]:
            if each["image_id"] not in images:
                raise ValueError(f"an annotation is of image {plain(each['image_id'])}, which is not listed")
            if not each.get("iscrowd"):
                left, top, width, height = each["bbox"]
                boxes[each["image_id"]].append([left, top, left + width, top + height])
        named = [
            (Path(each["file_name"]).name, (int(each["height"]), int(each["width"])), boxes[number])
            for number, each in images.items()
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a list of instances of COCO: {plain(error)}") from None
    folders = [folder / split, folder / "images" / split, folder / "images"]
    root = next((each for each in folders if each.is_dir()), None)
    if root is None:
        raise FileNotFoundError(f"no images for {file}: there is no folder {folders[0]} or {folders[1]}")
    return [
        (Path(name).stem, _annotated(root / name, Objects(_boxes_tensor(boxes, f"{file}, {plain(name)}"), size), file))
        for name, size, boxes in named
        if chosen is None or Path(name).stem in chosen
    ]


@dataclass(frozen=True)
class _WithoutExifTurn:
    """An image file that is read without its EXIF rotation, since its boxes were drawn without it."""

    file: Path

    def read(self) -> Image:
        from PIL import Image

        with Image.open(self.file, formats=FORMATS) as image:
            return image.convert("RGB")


def _annotated(image: Path, objects: Objects, annotations: Path) -> Sample[Objects]:
    """The sample of an image file with its boxes; read without its EXIF rotation if the boxes only fit it then.

    Raises:
        OSError: the image does not exist, or is not readable.
        ValueError: the image has another size than the file `annotations` says.
    """
    sample, size = sample_of_file(image, objects), size_of(image)
    if size == objects.size:
        return sample
    if is_turned(image) and size == objects.size[::-1]:
        return replace(sample, image=_WithoutExifTurn(image))
    raise ValueError(
        f"{image} has {size[0]} x {size[1]} pixels, but {annotations} says {objects.size[0]} x {objects.size[1]}"
    )


def _boxes_tensor(boxes: Sequence[Sequence[float]], where: str) -> Tensor:
    """The boxes as a tensor (n, 4). `where` is named in the error for a box that is empty or not finite."""
    tensor = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
    if not (tensor.isfinite().all() and (tensor[:, 2:] > tensor[:, :2]).all()):
        raise ValueError(f"{where} has a box that is empty or not finite")
    return tensor
