"""Split the images: some are held out to choose and verify the neurons, the others rank the neurons.

The first images of a stream are kept in memory, in two parts. Of the first `2 * held_out` images, those with odd
numbers are *held out*: they later choose and verify the neurons. The others are *diagnosed*: they show which patches
are outliers, and are the first to rank the neurons. The rest of the stream ranks the neurons as well.

The number of an image alone decides its part. So the parts do not depend on how many processes share the images, and
are the same in a resumed run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from testreg.calibration.budget import Budget
from testreg.calibration.view import View
from testreg.families import Grid
from testreg.io.images import Images, ImageStream
from testreg.io.packing import PackedImage
from testreg.io.preprocessing import Transform
from testreg.io.processes import all_gather, rank, world_size
from testreg.measure.outliers import token_norms

NUM_DIAGNOSED = 96  # at least this many images are diagnosed, if there are enough
NUM_CHOOSING = 16  # held-out images on which sets of neurons are compared; the others verify the chosen set
MIN_VERIFYING = 16  # with fewer images, a single outlier could decide whether the neurons are verified

NumberedImages = Iterator[tuple[int, Tensor]]
"""Images (3, h, w) with their numbers in the stream, in ascending order."""


class UnreadImages:
    """Numbered images that are still to be read. One image is read ahead, to know whether there are more."""

    def __init__(self, images: NumberedImages) -> None:
        self._images = images
        self._next = next(images, None)

    @property
    def is_empty(self) -> bool:
        """Whether all images are read."""
        return self._next is None

    def take(self, end: float = math.inf) -> NumberedImages:
        """Read and return the images with numbers below `end`."""
        while self._next is not None and self._next[0] < end:
            yield self._next
            self._next = next(self._images, None)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of a view that this process reads: two parts that are kept in memory, and the rest of the stream.

    Images are kept in a form that takes less memory (`PackedImage`).
    """

    view: View
    diagnosed: Sequence[tuple[int, PackedImage]]
    """The images that are diagnosed, and then rank the neurons, each with its number in the stream."""
    held_out: Sequence[tuple[int, PackedImage]]
    """The images that choose and verify the neurons, each with its number in the stream."""
    rest_start: int
    """The number at which the rest begins: all images with lower numbers are in one of the two parts."""
    rest: UnreadImages
    """The rest of the stream, whose images rank the neurons."""

    @property
    def grid(self) -> Grid:
        """The grid of patches of the first image."""
        return self.view.tower.grid(self.diagnosed[0][1].image)

    @property
    def num_kept(self) -> int:
        """How many images the two parts have, in all processes together."""
        return sum(all_gather(len(self.diagnosed) + len(self.held_out)))

    @property
    def can_verify(self) -> bool:
        """Whether there are enough held-out images to choose neurons on some of them and to verify on the others."""
        return sum(all_gather(len(self.held_out))) >= NUM_CHOOSING + MIN_VERIFYING

    def shortened(self, end: int) -> Split:
        """The split without the images whose number is `end` or higher: the rest is empty."""
        diagnosed, held_out = ([item for item in part if item[0] < end] for part in (self.diagnosed, self.held_out))
        return replace(self, diagnosed=diagnosed, held_out=held_out, rest=UnreadImages(iter(())))

    def to_rank(self, start: int) -> UnreadImages:
        """The images that rank the neurons and have numbers from `start` on: the diagnosed ones, then the rest."""
        rest = self.rest if start <= self.rest_start else _read_from(self.view.stream, start)
        diagnosed = ((number, packed.image) for number, packed in self.diagnosed if number >= start)
        return UnreadImages(itertools.chain(diagnosed, rest.take()))


def split(views: Sequence[View], budget: Budget) -> list[Split]:
    """Read the first images of each view, and keep them in two parts. Fewer images are kept if the budget is short.

    Raises:
        ValueError: there are too few images.
    """
    splits = [_split_view(view) for view in views]
    end = budget.affordable_images(splits[0].num_kept, lambda: [_run_one(each) for each in splits])
    return splits if end is None else [each.shortened(end) for each in splits]


def _split_view(view: View) -> Split:
    """Read the first images of a view, and keep them in two parts."""
    held_out = view.options.held_out
    end = max(2 * held_out, held_out + NUM_DIAGNOSED)
    rest = _read_from(view.stream, 0)
    parts: dict[bool, list[tuple[int, PackedImage]]] = {True: [], False: []}  # by whether they are held out
    for number, image in rest.take(end):
        parts[is_held_out(number, held_out)].append((number, PackedImage.of(image)))
    if 0 in all_gather(len(parts[False])):
        if world_size() > 1:
            raise ValueError(f"{view.stream.source} has fewer images than there are processes ({world_size()})")
        raise view.stream.nothing_read()
    if held_out and not any(all_gather(len(parts[True]))):
        raise ValueError(
            f"{view.stream.source} has a single image, and none to hold out: give more, or held_out=0 and top_k"
        )
    return Split(view, parts[False], parts[True], end, rest)


def _read_from(stream: ImageStream, start: int) -> UnreadImages:
    """The images of this process, from the number `start` on."""
    return UnreadImages(stream.numbered(start, rank(), world_size()))


@torch.no_grad()
def _run_one(split: Split) -> None:
    """Run the model on the first image, for its time."""
    token_norms(split.view.tower, split.diagnosed[0][1].image.unsqueeze(0)).cpu()  # .cpu() waits until a GPU is done


def is_held_out(number: int, held_out: int) -> bool:
    """Whether the image with this number is held out, if at most `held_out` images are."""
    return number % 2 == 1 and number < 2 * held_out


def held_out_images(
    images: Images, transform: Transform, *, held_out: int, num_images: int | None, seed: int
) -> list[Tensor]:
    """Read the images again that `calibrate` with these arguments holds out; each is a tensor (3, h, w)."""
    numbered = ImageStream(images, transform, num_images=num_images, seed=seed).numbered()
    first_images = itertools.takewhile(lambda item: item[0] < 2 * held_out, numbered)
    return [image for number, image in first_images if is_held_out(number, held_out)]
