"""`ImageStream`: reads the images of any source one by one, each with its number, as tensors for a model."""

from __future__ import annotations

import itertools
import math
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from testreg.families import Tower
from testreg.io.clips import clip_paths, read_clip
from testreg.io.decoding import decoded
from testreg.io.preprocessing import Transform
from testreg.io.sources import image_of, images_in, is_indexed, named_source, single_images, undecoded

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Images = Union[str, os.PathLike[str], "Image", Iterable[Any]]


class ImageStream:
    """The images of a source, one by one and numbered.

    By the numbers, several processes can share the images, and a run can continue where an interrupted one stopped.

    Sources by name (a string or path): a folder, which is searched with its subfolders; an image; a `.txt` with one
    path on each line; WebDataset shards (`photos/{000..015}.tar`, files or URLs); `hf-dataset:NAME[:SPLIT]`, a Hugging
    Face dataset, which is streamed; `hf-dataset:FOLDER[:SPLIT]`, a dataset that `save_to_disk` wrote.

    Sources as objects: an image; an iterable or Dataset of images, of (image, label) pairs, or of rows (dicts) with an
    image; a DataLoader or another iterable of batches of these; what a processor of transformers returns, or an
    iterable of that. A list may also hold paths of folders. If several processes read such an object, all of them must
    get the same images in the same order (for WebDataset: nodesplitter=None, shardshuffle=False).

    An image is a PIL image, a path, a uint8 array (h, w, 3) or a uint8 tensor (3, h, w), all of which are transformed;
    or a float tensor or array (3, h, w), which is taken as the model's input.

    If the tower takes clips, the sources are: a folder in which each sub-folder holds the frames of a clip, or each
    .gif or .webp is a clip; an iterable or DataLoader of clips; or tensors (N, frames, 3, h, w). A clip is such a
    sub-folder or animation, a list of PIL images or paths, or uint8 pixels, (frames, 3, h, w) as a tensor or (frames,
    h, w, 3) as an array: of all these, as many frames as the model needs are taken, evenly spaced. Or it is a float
    tensor (frames, 3, h, w), the model's input.

    Args:
        images: the source.
        transform: maps a PIL image to a float tensor (3, h, w), or frames to (frames, 3, h, w). It is not needed if the
            source yields float tensors.
        tower: the tower that gets the images. It tells whether clips are read, and how a processor's output is taken
            apart. None: images are read.
        num_images: read at most so many images, counting unreadable ones. From folders, lists and saved datasets by
            name they are drawn at random with the seed, since these are often sorted by class; from all other sources
            (streams, shards, objects), the first ones are taken.
        workers: processes that decode images. They are not used for sources that cannot be indexed, e.g. streams.
        seed: seed of the order in which images of indexed sources by name are read.

    Attributes:
        source: the name of the source, or the type of the object.
        indexed: whether any image of the source can be read by its number, without reading those before it.
        length: how many images will be read, at most num_images; None for a stream or iterator without that limit.
        num_read, num_skipped: how many images this process has yielded, and how many it could not read.
        first_unreadable: why the first unreadable image could not be read; "" if all could be read.

    Raises:
        FileNotFoundError, ValueError: the source does not exist, or has no image. While iterating: an item is not an
            image, or its tensor is not what a model takes.
        ImportError: the library that reads the source is not installed.
    """

    def __init__(
        self,
        images: Images,
        transform: Transform | None = None,
        *,
        tower: Tower | None = None,
        num_images: int | None = None,
        workers: int = 0,
        seed: int = 0,
    ) -> None:
        if num_images is not None and num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images}")
        self.limit, self.transform, self.workers, self.seed = num_images, transform, workers, seed
        self.tower, self.num_frames = tower, None if tower is None else tower.num_frames
        self.num_read = self.num_skipped = 0
        self.first_unreadable = ""
        self._has_warned = False
        if isinstance(images, str | os.PathLike):
            self.source = os.fspath(images)
            if transform is None:
                raise ValueError(f"{self.source} needs a transform from PIL image to tensor")
            clips = None if self.num_frames is None else clip_paths(self.source)
            self.items = undecoded(named_source(self.source) if clips is None else clips)
            if is_indexed(self.items):
                order = list(range(len(self.items)))
                random.Random(seed).shuffle(order)
                self.items = Subset(self.items, order)
        else:
            self.source = type(images).__name__
            self.items = undecoded(images_in(images, tower))
        self.indexed = is_indexed(self.items, tower)
        lengths = [n for n in (len(self.items) if self.indexed else None, num_images) if n is not None]
        self.length = min(lengths) if lengths else None

    def numbered(self, start: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield (number, image (3, h, w) or clip (frames, 3, h, w)), from the number `start` on, for this `rank`.

        An image belongs to the rank (number // 2) % world_size; images of other ranks are not decoded. Unreadable
        images are left out, but keep their number, so that numbers depend neither on `world_size` nor on `start`.
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
        """The error to raise if no image could be read."""
        reason = f" (the first: {self.first_unreadable})" if self.first_unreadable else ""
        skipped = f": all {self.num_skipped} were unreadable{reason}" if self.num_skipped else ""
        return ValueError(f"no image could be read from {self.source}{skipped}")

    def _check(self, number: int, image: object) -> None:
        """Raise ValueError for what no model takes, and warn once of values that look like pixels not normalised."""
        which = f"{'image' if self.num_frames is None else 'clip'} {number} of {self.source}"
        if not isinstance(image, Tensor) or not self._has_shape(image) or not image.is_floating_point():
            if self.tower is not None and self.num_frames is not None and isinstance(image, Tensor) and image.ndim == 3:
                raise self.tower.no_images_error()
            what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            shape = "(3, h, w)" if self.num_frames is None else f"({self.num_frames}, 3, h, w)"
            raise ValueError(f"{which} is {what} after its transform: a model takes float tensors {shape}")
        if image.shape[-3] > 4 and image.shape[-1] == 3:
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

    def _has_shape(self, image: Tensor) -> bool:
        """Whether a tensor has the shape of an image or clip that the tower takes."""
        if self.num_frames is not None:
            return image.ndim == 4 and len(image) == self.num_frames
        # In packed videos, one step in time has several frames, so that it has 4 dimensions.
        return image.ndim == 3 or (image.ndim == 4 and self.tower is not None and self.tower.family.takes != "images")

    def _loaded(self, start: int, is_own: Callable[[int], bool]) -> Iterator[tuple[int, Tensor | _Unreadable]]:
        """Yield number and image from the number `start` on, only of numbers that belong to this process."""
        if self.indexed:
            assert self.length is not None
            numbers = [number for number in range(start, self.length) if is_own(number)]
            # A DataLoader without a generator would change the global random state.
            yield from zip(
                numbers,
                DataLoader(
                    _Decoded(self.items, self.transform, self.num_frames),
                    batch_size=None,
                    sampler=numbers,
                    num_workers=self.workers,
                    generator=torch.Generator().manual_seed(self.seed),
                ),
                strict=True,
            )
        else:
            images = single_images(self.items, self.tower)
            for number, image in itertools.islice(enumerate(images), start, self.limit):
                if is_own(number):
                    yield number, _tensor(image, self.transform, self.num_frames)


@dataclass(frozen=True)
class _Unreadable:
    """Takes the place of an image that could not be read, and says why."""

    reason: str


class _Decoded(Dataset["Tensor | _Unreadable"]):
    """The images (3, h, w) or clips (frames, 3, h, w) of a source that can be indexed."""

    def __init__(self, items: Any, transform: Transform | None, num_frames: int | None) -> None:
        self.items, self.transform, self.num_frames = items, transform, num_frames

    def __getitem__(self, index: int) -> Tensor | _Unreadable:
        image = image_of(self.items[index], clips=self.num_frames is not None)
        return _tensor(image, self.transform, self.num_frames)


def _tensor(image: Any, transform: Transform | None, num_frames: int | None) -> Tensor | _Unreadable:
    """An image as the model's input (3, h, w), or a clip of `num_frames` frames (frames, 3, h, w)."""
    if image is None:
        return _Unreadable("there is no image")
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        image = torch.from_numpy(image)
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim not in (3, 4):
            raise ValueError(f"expected image tensors (3, h, w) or (B, 3, h, w), got {tuple(image.shape)}")
        return image
    if transform is None:
        what = f"{image.dtype} tensors" if isinstance(image, Tensor) else f"{type(image).__name__} images"
        raise ValueError(f"{what} need a transform to float tensors (3, h, w): pass transform=")
    try:
        picture = decoded(image) if num_frames is None else read_clip(image, num_frames)
    except OSError as error:
        return _Unreadable(str(error) or type(error).__name__)
    return transform(picture)


def in_lists(
    items: Iterable[T], batch_size: int, shape_of: Callable[[T], Sequence[int]], *, by_shape: bool
) -> Iterator[list[T]]:
    """Yield the items in lists of at most `batch_size`. If `by_shape`, all items in a list have the same shape."""
    for _, same_shape in itertools.groupby(items, lambda item: tuple(shape_of(item)) if by_shape else ()):
        while batch := list(itertools.islice(same_shape, batch_size)):
            yield batch


def batched(images: Iterable[Tensor], batch_size: int, *, by_shape: bool = False) -> Iterator[Tensor]:
    """Yield the images (3, h, w) in batches (B, 3, h, w) of at most `batch_size`.

    If `by_shape`, a batch ends before an image of another shape, so that batches may be smaller.

    Raises:
        ValueError: the images of a batch differ in shape.
    """
    for batch in in_lists(images, batch_size, lambda image: image.shape, by_shape=by_shape):
        if len({image.shape for image in batch}) > 1:
            shapes = ", ".join(sorted({str(tuple(image.shape)) for image in batch}))
            raise ValueError(f"images of different shapes ({shapes}) cannot be batched: use batch_size=1")
        yield torch.stack(batch)
