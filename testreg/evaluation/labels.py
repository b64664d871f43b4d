"""Reads data sets of labelled images: ImageFolder, parquet files, Hugging Face datasets."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testreg.evaluation.libraries import library
from testreg.evaluation.pixel_maps import SPLITS
from testreg.evaluation.samples import Row, Sample, images_under, sample_of_file
from testreg.files import plain, read_text, shown
from testreg.io.sources import COLUMNS

LABELS = ("label", "labels", "fine_label", "cls")  # names that a column of labels may have
LAYOUTS = (
    "a folder of folders, one a class (with train/ and val/ above them for two splits), parquet files (train and test "
    "in their names) with columns image and label, or hf-dataset:NAME"
)


@dataclass(frozen=True)
class Labelled:
    """A data set of images with class labels."""

    splits: Mapping[str, list[Sample[int]]]
    """The samples of the splits "train" and "val"; a data set without splits has its samples under ""."""
    classes: list[str] | None
    """The name of each class, by its label; None if the data set does not say."""


def labelled_images(data: str | os.PathLike[str]) -> Labelled:
    """The labelled images of a folder, of parquet files or of a Hugging Face dataset.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the layout is not known, a split is empty, or a class of one split is unknown in the other.
        ImportError: the library that reads this data set is not installed.
    """
    name = os.fspath(data)
    path = Path(name)
    if name.startswith("hf-dataset:"):
        labelled = _of_datasets(_datasets(name.removeprefix("hf-dataset:")), name)
    elif path.is_file() and path.suffix == ".parquet":
        labelled = _of_parquet({"": [path]})
    elif not path.is_dir():
        raise FileNotFoundError(f"no data at {name}: labels are read from {LAYOUTS}")
    elif files := sorted(path.rglob("*.parquet")):
        labelled = _of_parquet(dict(_by_split(files)))
    else:
        labelled = _of_folders(path)
    if not any(labelled.splits.values()):
        raise ValueError(f"{name} has no labelled images: they are read from {LAYOUTS}")
    for split, samples in labelled.splits.items():
        if not samples:
            raise ValueError(f"the split {split} of {name} is empty")
    train, val = labelled.splits.get("train"), labelled.splits.get("val")
    if train and val and (unknown := {each.target for each in val} - {each.target for each in train}):
        label = min(unknown)
        raise ValueError(
            f"{name}: class {labelled.classes[label] if labelled.classes else label} of val is not in train"
        )
    return labelled


def class_names(labelled: Labelled, classes: str | os.PathLike[str] | None) -> list[str]:
    """The names of the classes, from the file `classes` (one name on each line), or from the data set.

    Raises:
        ValueError: neither has names, or there are more classes than names.
    """
    names = labelled.classes
    if classes is not None:
        names = [line.strip() for line in read_text(classes).splitlines() if line.strip()]
    if names is None:
        raise ValueError(
            "the data does not say what its classes are called: name a file with a name a line (--classes)"
        )
    largest = max(each.target for samples in labelled.splits.values() for each in samples)
    if largest >= len(names):
        raise ValueError(
            f"there are {len(names)} names of classes, but an image of class {largest} (they count from 0)"
        )
    return names


def _of_folders(folder: Path) -> Labelled:
    """The images of an ImageFolder: one folder for each class, possibly below train/ and val/."""
    roots = {split: root for split, names in SPLITS.items() for name in names if (root := folder / name).is_dir()}
    by_class = {split: _classes_in(root) for split, root in (roots or {"": folder}).items()}
    classes = sorted({name for of_split in by_class.values() for name in of_split})
    numbers = {name: i for i, name in enumerate(classes)}
    return Labelled(
        {
            split: [sample_of_file(image, numbers[name]) for name, images in of_split.items() for image in images]
            for split, of_split in by_class.items()
        },
        classes,
    )


def _classes_in(root: Path) -> dict[str, list[Path]]:
    """{name of a class: the image files in its folder}, without empty folders."""
    return {each.name: images for each in sorted(root.iterdir()) if each.is_dir() and (images := images_under(each))}


def _by_split(files: list[Path]) -> Iterator[tuple[str, list[Path]]]:
    """Yield each split and its files, which have the split in their names; if no file has, all are of the split ""."""
    for split, names in SPLITS.items():
        if of_split := [file for file in files if any(name in file.stem for name in names)]:
            yield split, of_split
    if not any(name in file.stem for names in SPLITS.values() for name in names for file in files):
        yield "", files


def _of_parquet(files: Mapping[str, list[Path]]) -> Labelled:
    """The labelled images in parquet files, by split."""
    datasets = library("datasets")
    named = {split or "whole": [str(file) for file in each] for split, each in files.items()}
    try:
        splits = datasets.load_dataset("parquet", data_files=named)
    except Exception as error:  # pyarrow and datasets raise errors of many types
        raise ValueError(f"{next(iter(files.values()))[0]} is not a readable parquet file: {plain(error)}") from error
    return _of_datasets({"" if split == "whole" else split: rows for split, rows in splits.items()}, str(files))


def _datasets(name: str) -> Mapping[str, Any]:
    """{split: dataset} of a Hugging Face dataset: a folder that `save_to_disk` wrote, or a name on the Hub."""
    datasets = library("datasets")
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if name.startswith(("/", ".")) and not folder.is_dir():
        raise FileNotFoundError(f"no dataset's folder at {name}")
    splits = datasets.load_from_disk(folder) if saved else datasets.load_dataset(name)
    return splits if isinstance(splits, Mapping) else {"": splits}


def _of_datasets(rows_of: Mapping[str, Any], where: str) -> Labelled:
    """The labelled images of {split: dataset}; splits other than train and val are left out. `where` is for errors."""
    known = {name: split for split, names in SPLITS.items() for name in names} | {"": ""}
    splits: dict[str, list[Sample[int]]] = {}
    classes = None
    for name, rows in rows_of.items():
        if name in known:
            splits[known[name]], classes = _of_rows(rows, where)
    return Labelled(splits, classes)


def _of_rows(rows: Any, where: str) -> tuple[list[Sample[int]], list[str] | None]:
    """The samples of one dataset, and the names of its classes if it has them."""
    datasets = library("datasets")
    image = next((name for name in COLUMNS if name in rows.column_names), None)
    label = next((name for name in LABELS if name in rows.column_names), None)
    if image is None or label is None:
        missing = "images" if image is None else "labels"
        wanted = "image" if image is None else " or ".join(LABELS)
        raise ValueError(f"{where} has no column of {missing} among {', '.join(rows.column_names)}: name it {wanted}")
    labels = rows[label]
    bad = next((each for each in labels if type(each) is not int or each < 0), None)
    if bad is not None:
        raise ValueError(f"{where} has a label {shown(bad)}: labels are whole numbers from 0 on")
    named = getattr(rows.features[label], "names", None)
    only = rows.select_columns([image])
    if isinstance(rows.features[image], datasets.Image):
        only = only.cast_column(image, datasets.Image(decode=False))
    version = rows._fingerprint
    return [Sample(f"{version} {i}", Row(only, i, image), each) for i, each in enumerate(labels)], named
