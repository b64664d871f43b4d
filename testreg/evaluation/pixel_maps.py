"""Reads data sets of images that have a map, a value for every pixel: masks of classes, or depth."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from testreg.evaluation.bootstrap import Array
from testreg.evaluation.libraries import library
from testreg.evaluation.samples import Sample, images_under, sample_of_file, size_of
from testreg.files import plain, read_text
from testreg.io.decoding import FORMATS

MASKS = ("annotations", "masks", "semantic", "labels")  # names of folders of masks
DEPTHS = ("depth", "depths")  # names of folders of depth
IMAGES = ("images", "rgb")  # names of folders of images
SPLITS = {"train": ("train", "training", "train2017"), "val": ("val", "validation", "val2017", "test")}
"""{split: the names that its folder may have, or that its list or parquet files have in their names}."""
MAT = "gtsegs_ijcv.mat"  # the published file of ImageNet-segmentation


class Map(Protocol):
    """A value for every pixel of an image."""

    @property
    def name(self) -> str:
        """What errors call this map."""

    def read(self) -> Array:
        """The values, (h, w) whole numbers."""


@dataclass(frozen=True)
class MapFile:
    """A map in an image file of one channel."""

    file: Path

    @property
    def name(self) -> str:
        return str(self.file)

    def read(self) -> Array:
        from PIL import Image

        try:
            with Image.open(self.file, formats=FORMATS) as image:
                values = np.asarray(image)
        except (OSError, SyntaxError, ValueError) as error:
            raise OSError(f"{self.file} is not a readable image: {error}") from error
        if values.ndim != 2:
            raise ValueError(f"{self.file} has {values.shape[2]} channels: a map has one, with a value for every pixel")
        return values.astype(np.int32)


def mapped_images(data: str | os.PathLike[str], kinds: Sequence[str] = MASKS) -> dict[str, list[Sample[Map]]]:
    """The images of a data set that have a map: {"train": samples, "val": samples}, or {"": samples} without splits.

    Three layouts are known:

    - Images in images/ or rgb/, and their maps in annotations/, masks/, semantic/, labels/ or depth/, under the same
      name with any suffix. A split is a folder in both (images/training and annotations/training, as in ADE20k), or
      both are in the split's folder (train/rgb and train/depth). The images of a split may also be directly in the data
      folder (train2017).
    - NYUd as depth benchmarks have it: lists *_train.txt and *_test.txt, with an image and its depth on each line.
    - ImageNet-segmentation: the file gtsegs_ijcv.mat.

    Args:
        data: the folder of the data set, or the file gtsegs_ijcv.mat.
        kinds: the names that the folder of maps may have; if there are several folders, the first that holds maps is
            read.

    Raises:
        FileNotFoundError: there is no such folder, or no image for a map.
        ValueError: the layout is not known, there is no map, or a map has another size than its image.
    """
    folder = Path(data)
    if folder.name == MAT or (folder / MAT).is_file():
        return {"": _from_mat(folder if folder.name == MAT else folder / MAT)}
    if not folder.is_dir():
        raise FileNotFoundError(f"no data folder at {folder}: it holds {_layout(kinds)}")
    splits: dict[str, list[Sample[Map]]] = {}
    for split, samples in _splits(folder, kinds):
        if samples:
            splits.setdefault(split, []).extend(samples)
    if not splits:
        raise ValueError(f"{folder} holds no maps: it must hold {_layout(kinds)}")
    for samples in splits.values():
        for sample in samples:
            _check_size(sample)
    return splits


def _layout(kinds: Sequence[str]) -> str:
    """The folders that a data set must have, in words, for errors."""
    return f"{' or '.join(f'{name}/' for name in IMAGES)} and {' or '.join(f'{name}/' for name in kinds)}"


def _splits(folder: Path, kinds: Sequence[str]) -> Iterator[tuple[str, list[Sample[Map]]]]:
    """Yield (split, samples) for each layout in turn; layouts that the folder does not have yield no samples."""
    for split, names in SPLITS.items():
        if lists := [file for name in names for file in sorted(folder.glob(f"*_{name}.txt"))]:
            yield split, [pair for file in lists for pair in _from_list(folder, file)]
    for root in _first_with_images([folder / name for name in kinds]):
        parts = {split: [root / name for name in names if (root / name).is_dir()] for split, names in SPLITS.items()}
        for split, folders in parts.items():
            yield split, [pair for part in folders for pair in _paired(part, _images_of(folder, part.name))]
        if not any(parts.values()):
            yield "", _paired(root, _images_of(folder, ""))
    for split, names in SPLITS.items():
        above = [folder / name for name in names]
        roots = [(part, root) for part in above for root in _first_with_images([part / kind for kind in kinds])]
        yield split, [pair for part, root in roots for pair in _paired(root, _images_of(part, ""))]


def _first_with_images(folders: Sequence[Path]) -> list[Path]:
    """A list of the first of the folders that holds images, or []. (Others may hold the same masks in another form.)"""
    return [folder for folder in folders if images_under(folder)][:1]


def _images_of(folder: Path, split: str) -> Path:
    """The folder of the images of a split; "" if there are no splits."""
    candidates = [folder / name / split for name in IMAGES] + ([folder / split] if split else [])
    folder_of_images = next((each for each in candidates if each.is_dir()), None)
    if folder_of_images is None:
        raise FileNotFoundError(f"no images for the maps in {folder}: there is no folder {candidates[0]}")
    return folder_of_images


def _paired(maps: Path, images: Path) -> list[Sample[Map]]:
    """The maps in a folder, each with the image of the same name in another folder."""
    by_stem = {path.relative_to(images).with_suffix(""): path for path in images_under(images)}
    samples: list[Sample[Map]] = []
    for path in images_under(maps):
        stem = path.relative_to(maps).with_suffix("")
        if stem not in by_stem:
            raise FileNotFoundError(f"{path} has no image: there is no {images / stem} of any suffix")
        samples.append(sample_of_file(by_stem[stem], MapFile(path)))
    return samples


def _from_list(folder: Path, file: Path) -> list[Sample[Map]]:
    """The images and maps that a list names, one pair on each line, relative to the folder."""
    samples: list[Sample[Map]] = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        words = line.split()
        if not words or words[-1] == "None" or (len(words) > 1 and words[1] == "None"):  # frames without depth
            continue
        if len(words) < 2:
            raise ValueError(f"{file}, line {number}: expected an image and its map, got {plain(line)}")
        image, map_file = (folder / word.lstrip("/") for word in words[:2])
        if not map_file.is_file():
            raise FileNotFoundError(f"{file}, line {number}: there is no file {plain(map_file)}")
        samples.append(sample_of_file(image, MapFile(map_file)))
    return samples


def _check_size(sample: Sample[Map]) -> None:
    """Raise ValueError if a map in a file has another size than its image."""
    if isinstance(sample.target, MapFile) and isinstance(sample.image, Path):
        image_size, map_size = size_of(sample.image), size_of(sample.target.file)
        if image_size != map_size:
            raise ValueError(
                f"{sample.target.name} has {map_size[0]} x {map_size[1]} pixels, but its image {sample.image} has "
                f"{image_size[0]} x {image_size[1]}"
            )


# ImageNet-segmentation ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _MatEntry:
    """An image or a mask in the file of ImageNet-segmentation, which is of MATLAB 7.3 (HDF5)."""

    file: Path
    index: int
    kind: str
    """"img" for an image, "gt" (ground truth) for a mask."""

    @property
    def name(self) -> str:
        return f"{self.file}, {self.kind} {self.index}"

    def read(self) -> Array:
        with library("h5py").File(self.file) as mat:
            values = mat[mat[f"value/{self.kind}"][self.index, 0]]
            if self.kind == "gt":
                values = mat[values[0, 0]]
            values = np.asarray(values)
        return values.T.astype(np.int32) if self.kind == "gt" else np.ascontiguousarray(values.transpose(2, 1, 0))


def _from_mat(file: Path) -> list[Sample[Map]]:
    """All images of ImageNet-segmentation with their masks."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        with library("h5py").File(file) as mat:
            count = len(mat["value/img"])
    except (KeyError, OSError) as error:
        raise ValueError(f"{file} is not ImageNet-segmentation: {error}") from None
    state = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}"
    return [Sample(f"{state} {i}", _MatEntry(file, i, "img"), _MatEntry(file, i, "gt")) for i in range(count)]


# Splits ---------------------------------------------------------------------------------------------------------------


def one_split(splits: Mapping[str, list[Any]]) -> list[Any]:
    """The samples for tasks that fit nothing: val; all samples if there are no splits; train if there is no val."""
    return next(splits[name] for name in ("val", "", "train") if name in splits)


def two_splits(splits: Mapping[str, list[Any]], data: object, held_out: float = 0.25) -> tuple[list[Any], list[Any]]:
    """The samples to fit on and the samples to report on. Without splits, the last share `held_out` is reported.

    Raises:
        ValueError: a split is missing, or there are too few samples to split them.
    """
    if "train" in splits and "val" in splits:
        return splits["train"], splits["val"]
    if "" not in splits:
        missing = "val" if "train" in splits else "train"
        raise ValueError(f"{data} has no split {missing}: name its folder {' or '.join(SPLITS[missing])}")
    samples = splits[""]
    first = len(samples) - max(1, round(held_out * len(samples)))
    if first < 1:
        raise ValueError(f"{data} has {len(samples)} images: too few to split them")
    return samples[:first], samples[first:]
