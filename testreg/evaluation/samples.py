"""A sample: an image of a data set, and what is known of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from testreg.io.decoding import FORMATS, decoded
from testreg.io.sources import EXTENSIONS

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
S = TypeVar("S")
V = TypeVar("V")

ORIENTATION = 0x0112  # the EXIF tag


class Reader(Protocol):
    """An image that is read when it is needed."""

    def read(self) -> Any:
        """Whatever `testreg.io.decoding.decoded` takes."""


@dataclass(frozen=True)
class Row:
    """An image in a row of a data set."""

    rows: Any
    """A Hugging Face dataset, its images not decoded."""
    index: int
    column: str

    def read(self) -> Any:
        return self.rows[self.index][self.column]


@dataclass(frozen=True)
class Sample(Generic[T]):
    """An image, and the label, boxes, mask or depth that is the truth for it."""

    name: str
    """Identifies the image and its version: features are cached under this name."""
    image: Path | Reader
    """The path of the image, or a `Reader` of it."""
    target: T

    def open(self) -> Image:
        """The image as RGB.

        Raises:
            OSError: it cannot be read.
        """
        return decoded(self.image if isinstance(self.image, Path) else self.image.read())


def of_file(image: Path, target: T) -> Sample[T]:
    """The sample of an image file. Its name changes if the file does.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not image.is_file():
        raise FileNotFoundError(f"there is no image {image}")
    state = image.stat()
    return Sample(f"{image.resolve()} {state.st_size} {state.st_mtime_ns}", image, target)


def size_of(file: Path) -> tuple[int, int]:
    """Height and width of an image file, turned as its EXIF tag says; its pixels are not read.

    Raises:
        OSError: it is no readable image.
    """
    width, height = _read(file, lambda image: image.size)
    return (width, height) if is_turned(file) else (height, width)


def is_turned(file: Path) -> bool:
    """Whether the EXIF tag of an image file makes its rows columns."""
    return _read(file, lambda image: image.getexif().get(ORIENTATION, 1)) >= 5


def _read(file: Path, read: Callable[[Image], V]) -> V:
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as image:
            return read(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise OSError(f"{file} is not a readable image: {error}") from error


def images_under(folder: Path) -> list[Path]:
    """All image files in a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def drawn(samples: Sequence[S], count: int | None, seed: int) -> list[S]:
    """A seeded sample of at most `count`, in the order that they had; None: all."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[i] for i in sorted(random.Random(seed).sample(range(len(samples)), count))]
