"""Turns images of any form into RGB images of PIL: files, bytes, rows of datasets, arrays and tensors of pixels."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from testreg.files import regular_file

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""The formats that are read. PIL knows others, some of which run programs: EPS runs Ghostscript."""
MAX_ASPECT = 50
"""The longer side over the shorter one, at most. A transform that resizes the short side of a very oblong image would
fill the memory."""


def open_image(file: str | os.PathLike[str] | IO[bytes]) -> Image:
    """The image in `file` as RGB, rotated as its EXIF tag says.

    Raises:
        OSError: the file is missing, not a regular file, or not a readable image.
    """
    from PIL import Image, ImageOps

    source = regular_file(file) if isinstance(file, str | os.PathLike) else file
    with _reading(file), Image.open(source, formats=FORMATS) as image:
        _check_aspect(image)  # before the image is decoded, which could take too much memory
        return _rgb(ImageOps.exif_transpose(image), image.format)


def decoded(image: Any) -> Image:
    """The image as RGB, from a path, the bytes of a file, a row of a Hugging Face dataset, uint8 pixels or PIL.

    Raises:
        OSError: the image is not readable.
        ValueError: the image is of another type, or its pixels have a wrong dtype or shape.
    """
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if isinstance(image, bytes):
        return open_image(io.BytesIO(image))
    if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # an image that datasets has not decoded
        return _of_dataset(image["bytes"], image["path"])
    if isinstance(image, Tensor | np.ndarray):
        return _of_pixels(image)
    if not is_pil(image):
        raise ValueError(f"expected PIL images, paths or tensors (3, h, w), got {type(image).__name__}")
    with _reading(image):
        return _rgb(image)


def _of_dataset(data: bytes | None, path: str | None) -> Image:
    """The image of a row of a Hugging Face dataset, which has the bytes of a file, or its path or URL."""
    if data is not None:
        return open_image(io.BytesIO(data))
    if path is None:
        raise OSError("a row of the dataset has no image")
    if "://" not in path:
        return open_image(path)
    import fsspec  # the library that datasets opens URLs with

    with fsspec.open(path, "rb") as file:
        return open_image(file)


def _of_pixels(pixels: Tensor | np.ndarray[Any, Any]) -> Image:
    """The image with these uint8 pixels: a tensor (3, h, w), or an array (h, w, 3) as in PIL and matplotlib."""
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


def _check_aspect(image: Image) -> None:
    """Raise OSError if the image is too oblong."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise OSError(f"it has {image.width} x {image.height} pixels: no side may be {MAX_ASPECT} times the other")


def _rgb(image: Image, file_format: str | None = None) -> Image:
    """The image as RGB of 8 bits. (Pillow's own conversion would clip 16 bits to white, and make floats black.)"""
    from PIL import Image

    _check_aspect(image)
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise OSError("its values are floats that do not lie between 0 and 1")
        values = values * 255
    elif image.mode != "I" or file_format in ("PNG", "PPM"):  # values of 16 bits: mode I;16, and mode I of these files
        values = values / 257
    elif not (values.min() >= 0 and values.max() <= 255):
        raise OSError("its values are 32-bit integers that do not lie between 0 and 255")
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB")


@contextmanager
def _reading(what: object) -> Iterator[None]:
    """Turn the errors that PIL raises for unreadable images into one OSError, which names `what` is read.

    struct.error and TypeError come from damaged EXIF tags.
    """
    from PIL import Image

    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, struct.error, TypeError) as error:
        name = "an image in memory" if isinstance(what, io.IOBase) or is_pil(what) else what
        raise OSError(f"{name} is not a readable image: {str(error) or type(error).__name__}") from error


def is_pil(image: object) -> bool:
    """Whether `image` is a PIL image, told by its methods, so that PIL need not be imported."""
    return hasattr(image, "convert") and hasattr(image, "getpixel")
