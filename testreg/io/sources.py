"""Finds the images in a source: what a name stands for, and the images in the items of a dataset or iterable.

`ImageStream` says which sources there are. An *item* is what a source yields: an image, an (image, label) pair, a row
of a dataset, or a batch of these.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from testreg.families import Tower
from testreg.families.inputs import PIXELS
from testreg.files import regular_file
from testreg.io.decoding import is_pil
from testreg.io.names import KINDS

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Suffixes of image files."""
COLUMNS = (
    *PIXELS,
    "image",
    "img",
    "jpg",
    *sorted(extension[1:] for extension in EXTENSIONS),
)
"""Names of columns that may hold images, in the order in which they are looked for."""

# Sources by name ------------------------------------------------------------------------------------------------------


def check_images(images: str | os.PathLike[str]) -> None:
    """Check early that a source given by name can be read. Nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError, ImportError: what `ImageStream` would raise for it.
    """
    name = os.fspath(images)
    if name.startswith("hf-dataset:"):
        _dataset_name(name)
    elif name.endswith(".tar"):
        _shard_paths(name)
    elif name.lower().endswith(".txt") and not Path(name).is_dir():
        listed_paths(Path(name), Path.exists)  # images, or folders of clips: that depends on the model
    else:
        image_paths(name)


def named_source(images: str) -> Any:
    """The items of a source given by name: paths, rows of a Hugging Face dataset, or samples of shards."""
    if images.startswith("hf-dataset:"):
        return _hf_dataset(images)
    if images.endswith(".tar"):
        # `ImageStream.numbered` shares the samples among processes, so WebDataset must not. It must not decode either,
        # since its decoder unpickles.
        return _library("webdataset", images).WebDataset(
            _shard_paths(images), nodesplitter=None, workersplitter=None, shardshuffle=False, empty_check=False
        )
    return image_paths(images)


def image_paths(images: str | os.PathLike[str]) -> list[Path]:
    """The image files that `images` stands for: all in a folder, sorted; those in a list (.txt), in order; or a file.

    A folder is searched with its subfolders. A list has one path on each line, relative to the list's folder; blank
    lines and lines that start with # are skipped.

    Raises:
        FileNotFoundError, ValueError: the folder or file does not exist, has no image, or lists a missing file.
    """
    if Path(images).suffix.lower() == ".txt" and not Path(images).is_dir():
        return listed_paths(Path(images), Path.is_file)
    if is_named_as_image(images) and not Path(images).is_dir():
        return [regular_file(images)]
    if Path(images).is_file():
        raise ValueError(
            f"{images} is neither an image ({', '.join(sorted(EXTENSIONS))}) nor a list (.txt): give {KINDS}"
        )
    if not Path(images).is_dir():
        raise FileNotFoundError(f"no folder of images at {images}: give {KINDS}")
    paths = sorted(filter(is_named_as_image, Path(images).rglob("*")))
    if not paths:
        raise ValueError(f"no images ({', '.join(sorted(EXTENSIONS))}) in {images}")
    return paths


def is_named_as_image(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the suffix of an image file, in lower or upper case."""
    return Path(path).suffix.lower() in EXTENSIONS


def listed_paths(file: Path, exists: Callable[[Path], bool]) -> list[Path]:
    """The paths in a list (.txt), with one on each line; see `image_paths`.

    Args:
        exists: tells whether a path exists and is of the right kind.

    Raises:
        FileNotFoundError, ValueError: the list does not exist, is empty, or has a path that does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no list of images at {file}")
    lines = [(i, line.strip()) for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)]
    paths = {i: file.parent / line for i, line in lines if line and not line.startswith("#")}
    if not paths:
        raise ValueError(f"{file} lists no images: write one path a line")
    missing = [i for i, path in paths.items() if not exists(path)]
    if missing:
        raise FileNotFoundError(
            f"{file}, line {missing[0]}: there is no file {paths[missing[0]]}"
            + (f" ({len(missing)} of {len(paths)} are missing)" if len(missing) > 1 else "")
        )
    return list(paths.values())


def _shard_paths(images: str) -> list[str]:
    """The paths and URLs of shards, from a name with braces."""
    shards = _library("webdataset", images).shardlists.expand_urls(images)
    for shard in shards:
        scheme = urlsplit(shard).scheme
        if scheme == "pipe":
            raise ValueError(f"{shard} is a shell command, which is not run: give a webdataset.WebDataset of it")
        if not scheme and not Path(shard).is_file():
            raise FileNotFoundError(f"no shard at {shard}")
    return shards


def _dataset_name(images: str) -> tuple[str, str]:
    """The name or folder of a Hugging Face dataset, and its split ("" if none is named)."""
    _library("datasets", images)
    name, _, split = images.removeprefix("hf-dataset:").partition(":")
    name = os.path.expanduser(name)
    if not name:
        raise ValueError(f"{images} names no dataset: write hf-dataset:NAME or hf-dataset:NAME:SPLIT")
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise FileNotFoundError(f"no dataset's folder at {name}")
    return name, split


def _hf_dataset(images: str) -> Any:
    """The Hugging Face dataset that `images` (hf-dataset:...) names."""
    name, split = _dataset_name(images)
    datasets = _library("datasets", images)
    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # save_to_disk wrote it
        dataset = datasets.load_from_disk(name)
    else:
        dataset = datasets.load_dataset(name, streaming=True)
    splits = dataset if isinstance(dataset, Mapping) else {str(dataset.split or "train"): dataset}
    if not split and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        missing = f"has no split {split}" if split else "has several splits"
        raise ValueError(f"{name} {missing}: write " + " or ".join(f"hf-dataset:{name}:{each}" for each in splits))
    return splits[split]


def _library(name: str, images: str) -> Any:
    """Import an optional library; the error names the source `images` that needs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{images} is read by {name}, which is missing: pip install "testreg[data]"') from error


# Images of a source ---------------------------------------------------------------------------------------------------


def is_processed(item: Any) -> bool:
    """Whether an item is what a processor of transformers returns (or a row of a dataset with its columns)."""
    return isinstance(item, Mapping) and not {*PIXELS}.isdisjoint(item)


def images_in(images: Any, tower: Tower | None = None) -> Any:
    """The items of a source that is an object. A single image becomes a list; folders in a list become their images.

    Here and below, `tower` is the tower that gets the images: it tells whether clips are read, and how a processor's
    output is taken apart. If it is None, a processor's pixels are taken as they are.
    """
    if is_processed(images):
        separated = image_of(images) if tower is None else tower.separate(images)
        # One step in time of a packed video has several frames: by itself it would be taken for a batch.
        images = [images] if tower is not None and _is_batch(separated[0], tower) else separated
    if is_pil(images) or (isinstance(images, Tensor | np.ndarray) and images.ndim < 4):
        return [images]
    if _takes_clips(tower):
        return images
    if isinstance(images, list | tuple) and any(map(_is_folder, images)):
        return [path for each in images for path in (image_paths(each) if _is_folder(each) else [each])]
    return images


def _is_frame(item: object) -> bool:
    """Whether an item can be a frame in a list of frames: it is a PIL image or the path of an image file. Arrays and
    tensors are not frames."""
    return is_pil(item) or (isinstance(item, str | os.PathLike) and is_named_as_image(item))


def _is_folder(item: object) -> bool:
    """Whether an item is the path of a folder. A folder named like an image counts as an unreadable image instead."""
    return isinstance(item, str | os.PathLike) and not is_named_as_image(item) and Path(item).is_dir()


def undecoded(items: Any) -> Any:
    """A Hugging Face dataset reduced to its column of images, undecoded. Other sources stay as they are, and so do
    datasets without such a column or with a transform (`set_transform`).

    Undecoded, images that other processes read cost nothing, and a damaged one can be skipped.

    Raises:
        ValueError: `items` is a mapping, e.g. of several splits.
    """
    if isinstance(items, Mapping):
        raise ValueError(
            f"a {type(items).__name__} is several sources of images: choose one of {', '.join(map(str, items))}"
        )
    if not (hasattr(items, "cast_column") and getattr(items, "features", None)):
        return items
    import datasets

    columns = [name for name, feature in items.features.items() if isinstance(feature, datasets.Image)]
    is_transformed = isinstance(items, datasets.Dataset) and items.format["type"] == "custom"  # by set_transform
    if not columns or is_transformed:
        return items
    column = next((name for name in COLUMNS if name in columns), columns[0])
    items = items.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return items if column in COLUMNS else items.rename_column(column, COLUMNS[0])


def is_indexed(items: Any, tower: Tower | None = None) -> bool:
    """Whether `items[i]` is image i, as in a list or a map-style dataset.

    It is not if the items are batches, or if a processor made them of several images.
    """
    if isinstance(items, DataLoader | IterableDataset) or not (
        isinstance(items, Sized) and hasattr(items, "__getitem__")
    ):
        return False
    if not len(items):
        return True
    image = image_of(items[0], _takes_clips(tower))
    if tower is not None and is_processed(items[0]):
        return getattr(image, "shape", None) == tower.separate(items[0])[0].shape
    return not _is_batch(image, tower)


def _takes_clips(tower: Tower | None) -> bool:
    """Whether clips are read, not images."""
    return tower is not None and tower.num_frames is not None


def _is_batch(image: Any, tower: Tower | None) -> bool:
    """Whether a tensor or array is a batch of images or clips."""
    return isinstance(image, Tensor | np.ndarray) and image.ndim == (5 if _takes_clips(tower) else 4)


def single_images(items: Iterable[Any], tower: Tower | None = None) -> Iterator[Any]:
    """Yield the images or clips in the items of a source one by one; batches are taken apart."""
    for item in items:
        if tower is not None and is_processed(item):
            yield from tower.separate(item)
            continue
        image = image_of(item, _takes_clips(tower))
        if _is_batch(image, tower):
            yield from image
        else:
            yield image


def image_of(item: Any, clips: bool = False) -> Any:
    """The image, decoded or not, in an item that is an image, an (image, label) pair or a row.

    It is None if a row's column of images holds None, or if a sample of a shard has no such column. If `clips`, it is
    the clip in the item, and a list of two or more frames (`_is_frame`) is a clip.

    Raises:
        ValueError: a row, other than a sample of a shard, has no column of images.
    """
    if clips and isinstance(item, tuple | list) and len(item) > 1 and all(map(_is_frame, item)):
        return item
    if isinstance(item, tuple | list):
        item = item[0]
    if not isinstance(item, Mapping):
        return item
    column = next((name for name in COLUMNS if name in item), None)
    if column is None and "__key__" not in item:
        raise ValueError(f"no column of images among {', '.join(map(str, item))}: name one of them 'image'")
    return None if column is None else item[column]  # a sample of a shard lacks its image if the download failed
