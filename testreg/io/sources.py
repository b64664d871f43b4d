"""Sources of images: those that are given by name, and the images in the items of any source."""

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
COLUMNS = (
    *PIXELS,
    "image",
    "img",
    "jpg",
    *sorted(extension[1:] for extension in EXTENSIONS),
)  # of rows, the best first

# Sources by name ------------------------------------------------------------------------------------------------------


def check_images(images: str | os.PathLike[str]) -> None:
    """Raise at once what reading `images`, a source by name, would raise; nothing is downloaded.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `ImageStream`.
    """
    name = os.fspath(images)
    if name.startswith("hf-dataset:"):
        _dataset_name(name)
    elif name.endswith(".tar"):
        _shards(name)
    else:
        image_paths(name)


def named_source(images: str) -> Any:
    """The items of a source by name: paths, rows of a Hugging Face dataset or samples of shards."""
    if images.startswith("hf-dataset:"):
        return _hf_dataset(images)
    if images.endswith(".tar"):
        # Neither split by node nor by worker, which `numbered` does; undecoded, because its decoder unpickles.
        return _library("webdataset", images).WebDataset(
            _shards(images), nodesplitter=None, workersplitter=None, shardshuffle=False, empty_check=False
        )
    return image_paths(images)


def image_paths(images: str | os.PathLike[str]) -> list[Path]:
    """All image files under the folder `images`, sorted, those of the list `images` (.txt) in its order, or itself.

    A list has one path a line, relative to the list's folder; blank lines and lines that start with # do not count.

    Raises:
        FileNotFoundError, ValueError: no such folder or file, no image in it, or the list names a missing file.
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
    """Whether a file's name ends as that of an image does."""
    return Path(path).suffix.lower() in EXTENSIONS


def listed_paths(file: Path, exists: Callable[[Path], bool]) -> list[Path]:
    """The paths in a list (.txt), one a line, relative to its folder; blank lines and those with a # do not count.

    Raises:
        FileNotFoundError, ValueError: there is no list, nothing in it, or a path does not exist.
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


def _shards(images: str) -> list[str]:
    shards = _library("webdataset", images).shardlists.expand_urls(images)
    for shard in shards:
        scheme = urlsplit(shard).scheme
        if scheme == "pipe":
            raise ValueError(f"{shard} is a shell command, which is not run: give a webdataset.WebDataset of it")
        if not scheme and not Path(shard).is_file():
            raise FileNotFoundError(f"no shard at {shard}")
    return shards


def _dataset_name(images: str) -> tuple[str, str]:
    """The name, or folder, of a Hugging Face dataset, and its split or nothing."""
    _library("datasets", images)
    name, _, split = images.removeprefix("hf-dataset:").partition(":")
    name = os.path.expanduser(name)
    if not name:
        raise ValueError(f"{images} names no dataset: write hf-dataset:NAME or hf-dataset:NAME:SPLIT")
    if name.startswith(("/", ".")) and not Path(name).is_dir():
        raise FileNotFoundError(f"no dataset's folder at {name}")
    return name, split


def _hf_dataset(images: str) -> Any:
    name, split = _dataset_name(images)
    datasets = _library("datasets", images)
    if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # of save_to_disk
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
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{images} is read by {name}, which is missing: pip install "testreg[data]"') from error


# Images of a source ---------------------------------------------------------------------------------------------------


def is_processed(item: Any) -> bool:
    """Whether it is what a processor of transformers returns, or a row of a dataset of that."""
    return isinstance(item, Mapping) and not {*PIXELS}.isdisjoint(item)


def images_in(images: Any, tower: Tower | None = None) -> Any:
    """The items of a source that is an object; a single image becomes a list, folders in a list what they hold.

    Here and below, `tower` is the one that the images are for, which may take clips, and says what is made of what its
    processor returns; None: the pixels are taken as they are.
    """
    if is_processed(images):
        apart = image_of(images) if tower is None else tower.separate(images)
        # The frames that a packed video shows at one time would be taken for a batch.
        images = [images] if tower is not None and _is_batch(apart[0], tower) else apart
    if is_pil(images) or (isinstance(images, Tensor | np.ndarray) and images.ndim < 4):
        return [images]
    if _takes_clips(tower):
        return images
    if isinstance(images, list | tuple) and any(map(_is_folder, images)):
        return [path for each in images for path in (image_paths(each) if _is_folder(each) else [each])]
    return images


def _is_frame(item: object) -> bool:
    return is_pil(item) or (isinstance(item, str | os.PathLike) and is_named_as_image(item))


def _is_folder(item: object) -> bool:
    """Whether it is a folder; one that is named as an image counts as an unreadable image, as it does in a folder."""
    return isinstance(item, str | os.PathLike) and not is_named_as_image(item) and Path(item).is_dir()


def undecoded(items: Any) -> Any:
    """The column of images, not decoded, of a Hugging Face dataset that has one; everything else as it is.

    Images that other ranks read then cost nothing, and a broken one can be skipped.
    """
    if isinstance(items, Mapping):
        raise ValueError(
            f"a {type(items).__name__} is several sources of images: choose one of {', '.join(map(str, items))}"
        )
    if not (hasattr(items, "cast_column") and getattr(items, "features", None)):
        return items
    import datasets

    columns = [name for name, feature in items.features.items() if isinstance(feature, datasets.Image)]
    is_transformed = isinstance(items, datasets.Dataset) and items.format["type"] == "custom"  # set_transform
    if not columns or is_transformed:
        return items
    column = next((name for name in COLUMNS if name in columns), columns[0])
    items = items.with_format(None).select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return items if column in COLUMNS else items.rename_column(column, COLUMNS[0])


def is_indexed(items: Any, tower: Tower | None = None) -> bool:
    """Whether `items[i]` is image i: a list or map-style dataset, unless it holds batches, or what a processor makes of
    several images, or packs."""
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
    return tower is not None and tower.num_frames is not None


def _is_batch(image: Any, tower: Tower | None) -> bool:
    return isinstance(image, Tensor | np.ndarray) and image.ndim == (5 if _takes_clips(tower) else 4)


def single_images(items: Iterable[Any], tower: Tower | None = None) -> Iterator[Any]:
    """The images in the items of a source, each for itself where items are batches."""
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
    """The image, decoded or not, in one item of a source: an image, an (image, label) pair or a row. Or the clip, which
    a list of frames may be."""
    if clips and isinstance(item, tuple | list) and len(item) > 1 and all(map(_is_frame, item)):
        return item
    if isinstance(item, tuple | list):
        item = item[0]
    if not isinstance(item, Mapping):
        return item
    column = next((name for name in COLUMNS if name in item), None)
    if column is None and "__key__" not in item:
        raise ValueError(f"no column of images among {', '.join(map(str, item))}: name one of them 'image'")
    return None if column is None else item[column]  # samples of shards may lack the image: its download failed
