"""Images from folders, lists, datasets, shards and iterables, as numbered tensors or as batches."""

from __future__ import annotations

import importlib
import io
import itertools
import math
import os
import random
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Union
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from testreg.files import regular_file
from testreg.io.names import KINDS

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]
Images = Union[str, os.PathLike[str], "Image", Iterable[Any]]

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others can run programs: EPS runs Ghostscript
PIXELS = "pixel_values"  # of what transformers' image processors return
COLUMNS = (PIXELS, "image", "img", "jpg", *sorted(extension[1:] for extension in EXTENSIONS))  # of rows, the best first
MAX_ASPECT = 50  # a transform that resizes the short side makes gigabytes of a line of pixels


class ImageStream:
    """Single images, numbered, so that processes can share them out and a run can go on where another stopped.

    Args:
        images: by name, a folder (searched with its subfolders), an image, a `.txt` with a path a line, WebDataset
            shards (`photos/{000..015}.tar`, here or a URL), or a Hugging Face dataset: `hf-dataset:NAME[:SPLIT]`, which
            is streamed, or `hf-dataset:FOLDER[:SPLIT]` that `save_to_disk` wrote. As an object, an image, or a Dataset
            or any iterable of images, of (image, label) pairs or of rows (dicts) with an image, or a DataLoader or
            iterable of batches of them, or what an image processor of transformers returns. An image is a PIL image,
            a path, a uint8 array (h, w, 3) or uint8 tensor (3, h, w), which are transformed, or a float tensor or
            array (3, h, w), which is the model's input as it stands. A list may also name folders. Numbers count what
            comes: processes that share an object must see the same images in the same order (WebDataset:
            nodesplitter=None, shardshuffle=False).
        transform: PIL image -> float tensor (3, h, w); needed unless `images` yields float tensors.
        num_images: at most so many, unreadable ones included: of folders, lists and saved datasets given by name a
            seeded sample, since they are sorted by class; of everything else, streamed datasets and shards among it,
            the first.
        workers: processes that decode images, where these can be indexed: not of streams and iterators.

    Attributes:
        length: how many images there are, at most num_images; None for a stream or iterator.
        num_read, num_skipped: images that this process has yielded, and that it could not read.
        first_unreadable: why the first of these could not be read; empty if all could.

    Raises:
        FileNotFoundError, ValueError: `images` names nothing, or nothing with an image in it; while iterating, an
            image is none, or not what a model takes.
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
        self.first_unreadable = ""
        self._has_warned = False
        if isinstance(images, str | os.PathLike):
            self.source = os.fspath(images)
            if transform is None:
                raise ValueError(f"{self.source} needs a transform from PIL image to tensor")
            self.items = _undecoded(_named(self.source))
            if _is_indexed(self.items):
                order = list(range(len(self.items)))
                random.Random(seed).shuffle(order)
                self.items = Subset(self.items, order)
        else:
            self.source = type(images).__name__
            self.items = _undecoded(_images_in(images))
        self.indexed = _is_indexed(self.items)
        lengths = [n for n in (len(self.items) if self.indexed else None, num_images) if n is not None]
        self.length = min(lengths) if lengths else None

    def numbered(self, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Number and tensor (3, h, w) of the images from number `start` on that belong to `rank`.

        These are those whose (number // 2) % world_size == rank; others are not decoded. Unreadable images are counted
        and left out, but keep their number, so that numbers depend neither on `world_size` nor on `start`.
        """
        for number, image in self._loaded(start, lambda number: number // 2 % world_size == rank):
            if isinstance(image, _Unreadable):
                self.num_skipped += 1
                self.first_unreadable = self.first_unreadable or image.reason
            else:
                self.num_read += 1
                self._check(number, image)
                yield number, image

    def nothing_read(self) -> ValueError:
        """The error to raise where no image could be read."""
        reason = f" (the first: {self.first_unreadable})" if self.first_unreadable else ""
        skipped = f": all {self.num_skipped} were unreadable{reason}" if self.num_skipped else ""
        return ValueError(f"no image could be read from {self.source}{skipped}")

    def _check(self, number: int, image: object) -> None:
        which = f"image {number} of {self.source}"
        if not isinstance(image, Tensor) or image.ndim != 3 or not image.is_floating_point():
            what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"{which} is {what} after its transform: a model takes float tensors (3, h, w)")
        if image.shape[0] > 4 and image.shape[2] == 3:
            raise ValueError(f"{which} is {tuple(image.shape)}: move the channels to the front, (3, h, w)")
        low, high = (float(value) for value in image.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{which} holds values that are not finite (NaN or infinity)")
        if low >= 0 and high - low > 16 and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"the values of {which} run from {low:g} to {high:g}, like those of pixels that were not normalised: "
                "pass uint8 or PIL images, which are prepared as the model expects, or normalise them",
                stacklevel=3,
            )

    def _loaded(self, start: int, is_ours: Callable[[int], bool]) -> Iterator[tuple[int, Tensor | _Unreadable]]:
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
        self.first_unreadable = ""
        yield from batched((image for _, image in self.numbered()), self.batch_size)
        if not self.num_read:
            raise self.nothing_read()


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
    """All image files under the folder `images`, sorted, those of the list `images` (.txt) in its order, or itself.

    A list has one path a line, relative to the list's folder; blank lines and lines that start with # do not count.

    Raises:
        FileNotFoundError, ValueError: no such folder or file, no image in it, or the list names a missing file.
    """
    if Path(images).suffix.lower() == ".txt" and not Path(images).is_dir():
        return _listed_paths(Path(images))
    if _is_named_as_image(images) and not Path(images).is_dir():
        return [regular_file(images)]
    if not Path(images).is_dir():
        raise FileNotFoundError(f"no folder of images at {images}: give {KINDS}")
    paths = sorted(filter(_is_named_as_image, Path(images).rglob("*")))
    if not paths:
        raise ValueError(f"no images ({', '.join(sorted(EXTENSIONS))}) in {images}")
    return paths


def _is_named_as_image(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() in EXTENSIONS


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


def _images_in(images: Any) -> Any:
    """`images`, with one image as a list of it, and the folders in a list as what they hold."""
    if isinstance(images, Mapping) and PIXELS in images:
        images = images[PIXELS]
    if _is_pil(images) or (isinstance(images, Tensor | np.ndarray) and images.ndim < 4):
        return [images]
    if isinstance(images, list | tuple) and any(map(_is_folder, images)):
        return [path for each in images for path in (image_paths(each) if _is_folder(each) else [each])]
    return images


def _is_pil(image: object) -> bool:
    return hasattr(image, "convert") and hasattr(image, "getpixel")


def _is_folder(item: object) -> bool:
    """A folder that is named as an image counts as an unreadable one, as it does inside of a folder."""
    return isinstance(item, str | os.PathLike) and not _is_named_as_image(item) and Path(item).is_dir()


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
    return isinstance(image, Tensor | np.ndarray) and image.ndim == 4


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


@dataclass(frozen=True)
class _Unreadable:
    """In place of an image that could not be read."""

    reason: str


class _Decoded(Dataset["Tensor | _Unreadable"]):
    """Items as tensors (3, h, w)."""

    def __init__(self, items: Any, transform: Transform | None) -> None:
        self.items, self.transform = items, transform

    def __getitem__(self, index: int) -> Tensor | _Unreadable:
        return _tensor(_image(self.items[index]), self.transform)


def _tensor(image: Any, transform: Transform | None) -> Tensor | _Unreadable:
    """An image as the model's input."""
    if image is None:
        return _Unreadable("there is no image")
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        image = torch.from_numpy(image)
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3:
            raise ValueError(f"expected image tensors (3, h, w) or (B, 3, h, w), got {tuple(image.shape)}")
        return image
    if transform is None:
        what = f"{image.dtype} tensors" if isinstance(image, Tensor) else f"{type(image).__name__} images"
        raise ValueError(f"{what} need a transform to float tensors (3, h, w): pass transform=")
    try:
        picture = _decoded(image)
    except OSError as error:
        return _Unreadable(str(error) or type(error).__name__)
    return transform(picture)


def _decoded(image: Any) -> Image:
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if isinstance(image, bytes):
        return open_image(io.BytesIO(image))
    if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # of a Hugging Face dataset
        return _of_dataset(image["bytes"], image["path"])
    if isinstance(image, Tensor | np.ndarray):
        return _of_pixels(image)
    if not _is_pil(image):
        raise ValueError(f"expected PIL images, paths or tensors (3, h, w), got {type(image).__name__}")
    with _reading(image):
        return _rgb(image)


def _of_dataset(data: bytes | None, path: str | None) -> Image:
    if data is not None:
        return open_image(io.BytesIO(data))
    if path is None:
        raise OSError("a row of the dataset has no image")
    if "://" not in path:
        return open_image(path)
    import fsspec  # with which datasets streams

    with fsspec.open(path, "rb") as file:
        return open_image(file)


def _of_pixels(pixels: Tensor | np.ndarray[Any, Any]) -> Image:
    """Of uint8 values: a tensor (3, h, w), or an array (h, w, 3) as PIL, OpenCV and matplotlib have them."""
    from PIL import Image

    is_tensor = isinstance(pixels, Tensor)
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else pixels
    layout = "(3, h, w)" if is_tensor else "(h, w, 3)"
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0 if is_tensor else 2] != 3:
        kind = "tensors" if is_tensor else "arrays"
        raise ValueError(
            f"expected uint8 {kind} {layout} of pixels, or float ones (3, h, w) of the model's input, "
            f"got {array.dtype} {array.shape}"
        )
    return _rgb(Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0) if is_tensor else array)))


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Image:
    """The image in `file` as RGB, turned as its EXIF tag says.

    Raises:
        OSError: the file is missing, not a regular one, or no readable image.
    """
    from PIL import Image, ImageOps

    source = regular_file(file) if isinstance(file, str | os.PathLike) else file
    with _reading(file), Image.open(source, formats=FORMATS) as image:
        _check_aspect(image)
        _check_aspect(image)  # while it is not decoded yet
        return _rgb(ImageOps.exif_transpose(image), image.format)


def _check_aspect(image: Image) -> None:
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise OSError(f"it has {image.width} x {image.height} pixels: no side may be {MAX_ASPECT} times the other")


def _rgb(image: Image, file_format: str | None = None) -> Image:
    """8 bits of each colour. Pillow itself would clip 16 bits to white, and make floats black."""
    from PIL import Image

    _check_aspect(image)
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise OSError("its values are floats that do not lie between 0 and 1")
        values = values * 255
    elif image.mode != "I" or file_format in ("PNG", "PPM"):  # these have at most 16 bits, as I;16 has
        values = values / 257
    elif not (values.min() >= 0 and values.max() <= 255):
        raise OSError("its values are 32-bit integers that do not lie between 0 and 255")
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


@contextmanager
def _reading(what: object) -> Iterator[None]:
    """Makes one OSError of the errors that PIL has for unreadable images; the last two are of EXIF tags."""
    from PIL import Image

    try:
        yield
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
        struct.error,
        TypeError,
    ) as error:
        name = "an image in memory" if isinstance(what, io.IOBase) or _is_pil(what) else what
        raise OSError(f"{name} is not a readable image: {str(error) or type(error).__name__}") from error
