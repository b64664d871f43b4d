"""What evaluation is tested on: tiny models, and data sets of a few small pictures in every layout."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import IMAGE, NEURONS, build

from testreg.io.loading import LoadedModel
from testreg.neurons import RegisterNeurons

SIZES = ((64, 96), (80, 64), (64, 64), (72, 100))  # height, width
RANDOM = RegisterNeurons.from_blocks(NEURONS)


class Transform:
    """An image as 64 x 64 pixels in [-1, 1]."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels = np.asarray(image.resize((IMAGE, IMAGE)), dtype=np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def tiny_model(name: str = "hf_dinov2", seed: int = 0) -> LoadedModel:
    return LoadedModel(build(name, seed), Transform(), name)


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A bright rectangle on noise, of another colour for each number."""
    random = np.random.default_rng(number)
    pixels = random.integers(0, 80, (*size, 3), dtype=np.uint8)
    pixels[10:40, 20:60, number % 3] = 255
    return Image.fromarray(pixels)


def write_image(path: Path, number: int, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, size).save(path)
    return path


def write_map(path: Path, values: np.ndarray[Any, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def coco(folder: Path, count: int = 4, split: str = "val2017") -> Path:
    """A folder of COCO in which the bright rectangle of each image is its true box."""
    images, annotations = [], []
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        write_image(folder / split / f"{i}.png", i, (height, width))
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"image_id": i, "bbox": [20, 10, 40, 30], "iscrowd": 0})
    write_coco(folder, images, annotations, split)
    return folder


def write_coco(folder: Path, images: list[Any], annotations: list[Any], split: str = "val2017") -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    text = json.dumps({"images": images, "annotations": annotations, "categories": []})
    (folder / "annotations" / f"instances_{split}.json").write_text(text)


def voc(folder: Path, count: int = 2) -> Path:
    """A folder of Pascal VOC, whose boxes count pixels from 1."""
    (folder / "Annotations").mkdir(parents=True)
    for i in range(count):
        height, width = SIZES[i]
        write_image(folder / "JPEGImages" / f"{i:06}.jpg", i, (height, width))
        box = "<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>40</ymax></bndbox>"
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation>{size}<object><difficult>1</difficult>{box}</object></annotation>"
        (folder / "Annotations" / f"{i:06}.xml").write_text(text)
    return folder


def masks(folder: Path, count: int = 4, images: str = "images", maps: str = "masks") -> Path:
    """Images, and masks in which the bright rectangle is 1."""
    for i in range(count):
        size = SIZES[i % len(SIZES)]
        write_image(folder / images / f"{i}.jpg", i, size)
        values = np.zeros(size, dtype=np.uint8)
        values[10:40, 20:60] = 1
        write_map(folder / maps / f"{i}.png", values)
    return folder


def labelled(folder: Path, splits: tuple[str, ...] = ("train", "val"), count: int = 4) -> Path:
    """An ImageFolder of two classes, which are told apart by colour."""
    for split in splits:
        for number, name in enumerate(("red", "green")):
            for i in range(count):
                path = folder / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(number + 3 * i + 99 * splits.index(split), (64, 64)).save(path)
    return folder


def image_bytes(number: int) -> bytes:
    file = io.BytesIO()
    picture(number, (32, 32)).save(file, format="PNG")
    return file.getvalue()
