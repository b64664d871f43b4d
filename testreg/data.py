"""Images from folders, lists, datasets, shards and iterables, as numbered tensors or as batches."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import random
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
Images = str | os.PathLike[str] | Iterable[Any]

KINDS = "a folder, a list of paths (.txt), WebDataset shards (.tar) or hf-dataset:NAME[:SPLIT]"  # by name
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
COLUMNS = ("image", "img", "jpg", *sorted(extension[1:] for extension in EXTENSIONS))  # of rows, the best first


class ImageStream:
    """Single images, numbered, so that processes can share them out and a run can go on where another stopped.

    Args:
        images: by name, a folder (searched with its subfolders), a `.txt` with a path a line, WebDataset shards
            (`photos/{000..015}.tar`, here or a URL), or a Hugging Face dataset: `hf-dataset:NAME[:SPLIT]`, which is
            streamed, or `hf-dataset:FOLDER[:SPLIT]` that `save_to_disk` wrote. As an object, a Dataset or any iterable
            of PIL images, of paths, of tensors (3, h, w), of (image, label) pairs or of rows (dicts) with an image, or
            a DataLoader or iterable of tensors (B, 3, h, w). Numbers count what comes: processes that share an object
            must see the same images in the same order (WebDataset: nodesplitter=None, shardshuffle=False).
        transform: PIL image -> tensor (3, h, w); needed unless `images` yields tensors.
        num_images: at most so many, unreadable ones included: of folders, lists and saved datasets given by name a
            seeded sample, since they are sorted by class; of everything else, streamed datasets and shards among it,
            the first.
        workers: processes that decode images, where these can be indexed: not of streams and iterators.

    Attributes:
        length: how many images there are, at most num_images; None for a stream or iterator.
        num_read, num_skipped: images that this process has yielded, and that it could not read.

    Raises:
        FileNotFoundError, ValueError: `images` names nothing, or nothing with an image in it.
        ImportError: the library that reads `images` is not installed.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform | None = None,
        *,
        num_images: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.limit, self.transform, self.workers, self.seed = num_images, transform, workers, seed
        self.num_read = self.num_skipped = 0
        if isinstance(images, str | os.PathLike):
            self.source = os.fspath(images)
            if transform is None:
                raise ValueError(f"{self.source} needs a transform from PIL image to tensor")
            self.items = _undecoded(_named(self.source))
            if _is_indexed(self.items):
                order = list(range(len(self.items)))
                random.Random(seed).shuffle(order)
                self.items = Subset(self.items, order[:num_images])
        else:
            self.source = type(images).__name__
            self.items = _undecoded(images)
        self.indexed = _is_indexed(self.items)
        lengths = [n for n in (len(self.items) if self.indexed else None, num_images) if n is not None]
        self.length = min(lengths) if lengths else None

    def numbered(self, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Number and tensor (3, h, w) of the images from number `start` on that belong to `rank`.

        These are those whose (number // 2) % world_size == rank; others are not decoded. Unreadable images are counted
        and left out, but keep their number, so that numbers depend neither on `world_size` nor on `start`.
        """
        for number, image in self._loaded(start, lambda number: number // 2 % world_size == rank):
            if image is None:
                self.num_skipped += 1
            else:
                self.num_read += 1
                yield number, image

    def _loaded(self, start: int, is_ours: Callable[[int], bool]) -> Iterator[tuple[int, Tensor | None]]:
        if self.indexed:
            assert self.length is not None
            numbers = [number for number in range(start, self.length) if is_ours(number)]
            # Its own generator, because a DataLoader without one draws from the global one.
            yield from zip(
                numbers,
                DataLoader(
                    _Decoded(self.items, self.transform),
                    batch_size=None,
                    sampler=numbers,
                    num_workers=self.workers,
                    generator=torch.Generator().manual_seed(self.seed),
                ),
                strict=True,
            )
        else:
            for number, image in itertools.islice(enumerate(_singles(self.items)), start, self.limit):
                if is_ours(number):
                    yield number, _tensor(image, self.transform)


class ImageBatches(ImageStream):
    """Iterates over all images of an `ImageStream` in batches (B, 3, h, w), counting anew each time.

    Raises:
        FileNotFoundError, ValueError: as `ImageStream`; while iterating, if no image could be read.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform | None = None,
        *,
        batch_size: int = 16,
        num_images: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        super().__init__(images, transform, num_images=num_images, workers=workers, seed=seed)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        self.num_read = self.num_skipped = 0
        yield from batched((image for _, image in self.numbered()), self.batch_size)
        if not self.num_read:
            skipped = f": all {self.num_skipped} were unreadable" if self.num_skipped else ""
            raise ValueError(f"no image could be read from {self.source}{skipped}")


def batched(images: Iterable[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Tensors (3, h, w) as batches (B, 3, h, w), the last one maybe smaller.

    Raises:
        ValueError: the images of a batch differ in shape.
    """
    images = iter(images)
    while batch := list(itertools.islice(images, batch_size)):
        if len({image.shape for image in batch}) > 1:
            shapes = ", ".join(sorted({str(tuple(image.shape)) for image in batch}))
            raise ValueError(f"images of different shapes ({shapes}) cannot be batched: use batch_size=1")
        yield torch.stack(batch)


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


def _named(images: str) -> Any:
    if images.startswith("hf-dataset:"):
        return _hf_dataset(images)
    if images.endswith(".tar"):
        # Neither split by node nor by worker, which `numbered` does; undecoded, because its decoder unpickles.
        return _library("webdataset", images).WebDataset(
            _shards(images), nodesplitter=None, workersplitter=None, shardshuffle=False, empty_check=False
        )
    return image_paths(images)


def image_paths(images: str | os.PathLike[str]) -> list[Path]:
    """All image files under the folder `images`, sorted, or those of the list `images` (.txt) in its order.

    A list has one path a line, relative to the list's folder; blank lines and lines that start with # do not count.

    Raises:
        FileNotFoundError, ValueError: no such folder or list, no image in it, or the list names a missing file.
    """
    if Path(images).suffix.lower() == ".txt" and not Path(images).is_dir():
        return _listed_paths(Path(images))
    if not Path(images).is_dir():
        raise FileNotFoundError(f"no folder of images at {images}: give {KINDS}")
    paths = sorted(path for path in Path(images).rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not paths:
        raise ValueError(f"no images ({', '.join(sorted(EXTENSIONS))}) in {images}")
    return paths


def _listed_paths(file: Path) -> list[Path]:
    if not file.is_file():
        raise FileNotFoundError(f"no list of images at {file}")
    lines = [(i, line.strip()) for i, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)]
    paths = {i: file.parent / line for i, line in lines if line and not line.startswith("#")}
    if not paths:
        raise ValueError(f"{file} lists no images: write one path a line")
    missing = [i for i, path in paths.items() if not path.is_file()]
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
        found = datasets.load_from_disk(name)
    else:
        found = datasets.load_dataset(name, streaming=True)
    splits = found if isinstance(found, Mapping) else {str(found.split or "train"): found}
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


def _undecoded(items: Any) -> Any:
    """Of Hugging Face datasets with a column of images that column, undecoded; everything else as it is.

    Undecoded, so that images of other ranks cost nothing and a broken one can be skipped.
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


def _is_indexed(items: Any) -> bool:
    """Whether `items[i]` is image i: a list or map-style dataset, unless it holds batches."""
    if isinstance(items, DataLoader | IterableDataset) or not (
        isinstance(items, Sized) and hasattr(items, "__getitem__")
    ):
        return False
    return not len(items) or not _is_batch(_image(items[0]))


def _is_batch(image: Any) -> bool:
    return isinstance(image, Tensor) and image.ndim == 4


def _singles(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        image = _image(item)
        if _is_batch(image):
            yield from image
        else:
            yield image


def _image(item: Any) -> Any:
    """The image, decoded or not, in one item of a source: an image, an (image, label) pair or a row."""
    if isinstance(item, tuple | list):
        item = item[0]
    if not isinstance(item, Mapping):
        return item
    column = next((name for name in COLUMNS if name in item), None)
    if column is None and "__key__" not in item:
        raise ValueError(f"no column of images among {', '.join(map(str, item))}: name one of them 'image'")
    return None if column is None else item[column]  # samples of shards may lack the image: its download failed


class _Decoded(Dataset[Tensor | None]):
    """Items as tensors (3, h, w); None for one that cannot be read."""

    def __init__(self, items: Any, transform: Transform | None) -> None:
        self.items, self.transform = items, transform

    def __getitem__(self, index: int) -> Tensor | None:
        return _tensor(_image(self.items[index]), self.transform)


def _tensor(image: Any, transform: Transform | None) -> Tensor | None:
    """An image as tensor (3, h, w); None if it cannot be read."""
    if image is None:
        return None
    if isinstance(image, Tensor):
        if image.ndim != 3:
            raise ValueError(f"expected image tensors (3, h, w) or (B, 3, h, w), got {tuple(image.shape)}")
        return image
    if transform is None:
        raise ValueError(f"{type(image).__name__} images need a transform to tensors (3, h, w)")
    try:
        picture = _decoded(image)
    except OSError:
        return None
    return transform(picture)


def _decoded(image: Any) -> Image:
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if isinstance(image, bytes):
        return open_image(io.BytesIO(image))
    if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # of a Hugging Face dataset
        import datasets

        with _reading(image["path"] or "an image of a dataset"):
            return datasets.Image().decode_example(dict(image)).convert("RGB")
    if not hasattr(image, "convert"):
        raise ValueError(f"expected PIL images, paths or tensors (3, h, w), got {type(image).__name__}")
    with _reading(image):
        return image.convert("RGB")


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Image:
    """The image in `file` as RGB, turned as its EXIF tag says.

    Raises:
        OSError: the file is missing or no readable image.
    """
    from PIL import Image, ImageOps

    with _reading(file), Image.open(file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _reading(what: object) -> Iterator[None]:
    """Makes an OSError of the other errors that PIL has for unreadable images; the last two are of EXIF tags."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (
        UnidentifiedImageError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        struct.error,
        TypeError,
    ) as error:
        raise OSError(f"{what} is not a readable image: {error}") from error
