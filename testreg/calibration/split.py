"""Which images choose and verify the neurons, and which rank them.

An image's part depends on its number alone, so that several processes share the images as one does, and a run that goes
on knows which it had.
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

NUM_DIAGNOSED = 96  # of the first images, or as many as are not held out
NUM_CHOOSING = 16  # held-out images on which sets of neurons are compared; the rest verifies the one that was chosen
MIN_VERIFYING = 16  # fewer images verify nothing: one more or less of their outliers decides

Numbered = Iterator[tuple[int, Tensor]]
"""Images (3, h, w) with their numbers in the stream, in ascending order."""


class Unread:
    """Numbered images that were not taken yet, of which one is read ahead: so it is known whether there are more."""

    def __init__(self, images: Numbered) -> None:
        self._images = images
        self._next = next(images, None)

    @property
    def is_empty(self) -> bool:
        return self._next is None

    def take(self, end: float = math.inf) -> Numbered:
        """Those with numbers below `end`, which are taken by that."""
        while self._next is not None and self._next[0] < end:
            yield self._next
            self._next = next(self._images, None)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of a view that this process reads: the first ones, which are kept in two parts, and all others."""

    view: View
    first: Sequence[tuple[int, PackedImage]]
    """The first images that diagnosis and ranking use, each with its number in the stream."""
    held_out: Sequence[tuple[int, PackedImage]]
    """Those that choose and verify."""
    end: int
    """All images with lower numbers are in one of the two parts."""
    rest: Unread

    @property
    def grid(self) -> Grid:
        return self.view.tower.grid(self.first[0][1].image)

    @property
    def num_first(self) -> int:
        """How many images are in the two parts, in all processes."""
        return sum(all_gather(len(self.first) + len(self.held_out)))

    @property
    def can_verify(self) -> bool:
        """Whether there are enough held-out images to choose on some and to verify on others."""
        return sum(all_gather(len(self.held_out))) >= NUM_CHOOSING + MIN_VERIFYING

    def shortened(self, number: int) -> Split:
        """The same with no more than so many of the first images, and none behind these."""
        first, held_out = ([item for item in part if item[0] < number] for part in (self.first, self.held_out))
        return replace(self, first=first, held_out=held_out, rest=Unread(iter(())))

    def to_rank(self, start: int) -> Unread:
        """The images for ranking that are numbered from `start` on: the first ones, and then the rest."""
        rest = self.rest if start <= self.end else _read_from(self.view.stream, start)
        first = ((number, packed.image) for number, packed in self.first if number >= start)
        return Unread(itertools.chain(first, rest.take()))


def split(views: Sequence[View], budget: Budget) -> list[Split]:
    """Read the first images of each view, and put every other one of the first `2 * held_out` aside; the budget may pay
    for fewer images only.

    Raises:
        ValueError: there are too few images.
    """
    splits = [_split(view) for view in views]
    number = budget.images(splits[0].num_first, lambda: [_run_one(each) for each in splits])
    return splits if number is None else [each.shortened(number) for each in splits]


def _split(view: View) -> Split:
    held_out = view.options.held_out
    end = max(2 * held_out, held_out + NUM_DIAGNOSED)
    rest = _read_from(view.stream, 0)
    parts: dict[bool, list[tuple[int, PackedImage]]] = {True: [], False: []}
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


def _read_from(stream: ImageStream, start: int) -> Unread:
    return Unread(stream.numbered(start, rank(), world_size()))


@torch.no_grad()
def _run_one(split: Split) -> None:
    """Run the model on the first image."""
    token_norms(split.view.tower, split.first[0][1].image.unsqueeze(0)).cpu()  # waits for a GPU


def is_held_out(number: int, held_out: int) -> bool:
    """Whether the image with this number is put aside, if at most `held_out` are."""
    return number % 2 == 1 and number < 2 * held_out


def held_out_images(
    images: Images, transform: Transform, *, held_out: int, num_images: int | None, seed: int
) -> list[Tensor]:
    """The images that `calibrate` with these arguments puts aside, read again."""
    numbered = ImageStream(images, transform, num_images=num_images, seed=seed).numbered()
    first = itertools.takewhile(lambda item: item[0] < 2 * held_out, numbered)
    return [image for number, image in first if is_held_out(number, held_out)]
