"""A model at one image size: which images choose and verify its neurons, which rank them, and what they show."""

from __future__ import annotations

import functools
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from testreg.calibration.effects import EffectMeter
from testreg.calibration.options import Options
from testreg.families import Grid, Tower, compare_weights, find_tower, fingerprint
from testreg.io.images import Images, ImageStream, batched, in_lists
from testreg.io.packing import PackedImage
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.processes import gathered, rank, world_size
from testreg.io.progress import progress_bar
from testreg.measure.attribution import counted_outliers
from testreg.measure.conclusion import conclude
from testreg.measure.diagnosis import Diagnosis
from testreg.measure.observation import observe
from testreg.measure.outliers import MIN_FRACTION, Detection, Position, token_norms
from testreg.measure.ranking import Score, Statistics, overlap, scores, statistics_of
from testreg.neurons import Neuron, unscored
from testreg.patching.notices import warn_of_activation
from testreg.register import is_patched, patched

NUM_DIAGNOSED = 96  # of the first images, or as many as are not held out
FIRST_CHUNK = 16  # images between two checks of whether the ranking is stable, and between two saved states
CHUNK = 64  # the same behind the first images, which processes have yet to read
NUM_CHOOSING = 16  # held-out images on which sets of neurons are compared; the rest verifies the one that was chosen
NUM_RANKED_AGAIN = 16  # of the first images that have outliers, by a process, once some neurons are moved
MIN_VERIFYING = 16  # fewer images verify nothing: one more or less of their outliers decides


@dataclass(eq=False)
class View:
    """A model at one image size, the images prepared for it, and what they showed."""

    model: nn.Module
    tower: Tower
    stream: ImageStream
    options: Options
    first: list[tuple[int, PackedImage]] = field(default_factory=list)
    """The first images of this process that diagnosis and ranking use, each with its number in the stream."""
    held_out: list[tuple[int, PackedImage]] = field(default_factory=list)
    end_of_first: int = 0
    """All images with lower numbers have been split into `first` and `held_out`."""

    def __post_init__(self) -> None:
        self.statistics = Statistics.zeros(self.tower)
        self.norms: dict[int, Tensor] = {}
        """Norms (L, T) of the tokens of the first images, by their numbers."""
        self.ignored: frozenset[Position] = frozenset()
        """Fixed positions of outliers, for which no neurons are sought."""
        self.diagnosis: Diagnosis
        """What the view shows, without outliers at the `ignored` positions."""
        self.detection: Detection
        self.onset: int
        """The block after which the outliers are there."""
        self.next: tuple[int, Tensor] | None
        """The next image of this process that was not read yet; None behind the last."""

    @property
    def grid(self) -> Grid:
        return self.tower.grid(self.first[0][1].image)

    @property
    def blocks_with_outliers(self) -> list[int]:
        """The blocks after which the first images have outliers enough to be fixed."""
        blocks = enumerate(self.diagnosis.blocks)
        return [index for index, block in blocks if block.after_mlp.outlier_fraction >= MIN_FRACTION]

    @property
    def dtype(self) -> str:
        """The dtype in which the model computes, e.g. "bfloat16"."""
        return str(self.options.amp or self.tower.dtype).removeprefix("torch.")

    def split(self) -> None:
        """Read the first images, and split them: every other one of the first `2 * held_out` is held out.

        Raises:
            ValueError: there are too few images.
        """
        held_out = self.options.held_out
        self.go_to(0)
        self.end_of_first = max(2 * held_out, held_out + NUM_DIAGNOSED)
        for number, image in self.take(self.end_of_first):
            part = self.held_out if is_held_out(number, held_out) else self.first
            part.append((number, PackedImage.of(image)))
        self.unranked = deque(self.first)
        if 0 in gathered(len(self.first)):
            if world_size() > 1:
                raise ValueError(f"{self.stream.source} has fewer images than there are processes ({world_size()})")
            raise self.stream.nothing_read()
        if held_out and not any(gathered(len(self.held_out))):
            raise ValueError(
                f"{self.stream.source} has a single image, and none to hold out: give more, or held_out=0 and top_k"
            )

    @torch.no_grad()
    def run_one(self) -> None:
        """Run the model on the first image."""
        token_norms(self.tower, self.first[0][1].image.unsqueeze(0)).cpu()  # waits for a GPU

    def keep_first(self, number: int) -> None:
        """Use no more than so many of the first images, and none behind these."""
        self.next = None
        for part in (self.first, self.held_out):
            part[:] = [item for item in part if item[0] < number]
        self.unranked = deque(self.first)

    @property
    def num_first(self) -> int:
        """How many of the first images all processes could read."""
        return sum(gathered(len(self.first) + len(self.held_out)))

    @property
    def is_split(self) -> bool:
        """Whether there are enough held-out images to choose on some and to verify on others."""
        return sum(gathered(len(self.held_out))) >= NUM_CHOOSING + MIN_VERIFYING

    def meters(self) -> tuple[EffectMeter, EffectMeter]:
        """What measures sets of neurons on held-out images, to choose one, and to verify it: on others, if there are
        enough images, and else on all."""
        meter = EffectMeter(
            self.model,
            self.tower,
            [packed for _, packed in self.held_out],
            self.detection,
            self.onset,
            batch_size=self.options.batch_size,
            head=self.options.head,
            seed=self.options.seed,
        )
        return meter.split(NUM_CHOOSING) if self.is_split else (meter, meter)

    def go_to(self, number: int) -> None:
        """Make the image with this number the next to be read."""
        self.numbered = self.stream.numbered(number, rank(), world_size())
        self.next = next(self.numbered, None)

    def take(self, end: int) -> Iterator[tuple[int, Tensor]]:
        """The images of this process that are numbered below `end` and were not read yet."""
        while self.next is not None and self.next[0] < end:
            yield self.next
            self.next = next(self.numbered, None)

    def skip_ranked(self, done: int) -> None:
        """Leave out images that are numbered below `done`: they are in the statistics."""
        self.unranked = deque(item for item in self.first if item[0] >= done)
        if done > self.end_of_first:
            self.go_to(done)

    def take_unranked(self, end: int) -> Iterator[tuple[int, Tensor]]:
        """The images for ranking that are numbered below `end` and were not taken yet."""
        while self.unranked and self.unranked[0][0] < end:
            number, packed = self.unranked.popleft()
            yield number, packed.image
        yield from self.take(end)

    @property
    def is_read(self) -> bool:
        """Whether this process has no more images to rank by."""
        return not self.unranked and self.next is None

    def diagnose(self) -> Diagnosis:
        """The diagnosis of the first images of all processes, without outliers at the `ignored` positions."""
        by_shape = self.tower.family.keeps_shape
        batches = batched((packed.image for _, packed in self.first), self.options.batch_size, by_shape=by_shape)
        rule, norms = self.options.outlier_rule, list[Tensor]()  # (L, T) of each image
        with progress_bar("diagnosing", len(self.first), self.options.progress) as bar:
            seen = observe(
                self.tower,
                batches,
                rule,
                ignored=self.ignored,
                attention=False,
                on_images=bar.update,
                on_norms=norms.extend,
            )
        self.norms = dict(zip((number for number, _ in self.first), norms, strict=True))
        return conclude(self.model, gathered(seen), rule, block=self.options.block)

    def add_statistics(self, numbered: Iterator[tuple[int, Tensor]], on_images: Callable[[int], object]) -> None:
        """Add numbered images of this process, and those of the others, to the statistics.

        Args:
            on_images: called with the number of images after each batch.
        """
        self.statistics += self._statistics_of(numbered, on_images, self.norms)

    def statistics_with(self, moved: Sequence[Neuron]) -> Statistics:
        """The statistics of the first images of all processes once some neurons are moved, over both halves.

        Images without outliers are left out: they have none that were hidden.
        """
        numbered = ((number, packed.image) for number, packed in self.first)
        with_outliers = (item for item in numbered if self._has_outliers(*item))
        with patched(self.model, unscored(moved)):
            return self._statistics_of(
                itertools.islice(with_outliers, NUM_RANKED_AGAIN), lambda count: None, {}
            ).total()

    def _has_outliers(self, number: int, image: Tensor) -> bool:
        """Whether one of the first images has outliers, after the blocks that count."""
        norms = self.norms[number].unsqueeze(1)
        return bool(counted_outliers(self.tower, image.unsqueeze(0), norms, self.detection).any())

    def _statistics_of(
        self,
        numbered: Iterator[tuple[int, Tensor]],
        on_images: Callable[[int], object],
        known_norms: Mapping[int, Tensor],
    ) -> Statistics:
        """The statistics of numbered images of this process and of those of the others.

        Args:
            known_norms: norms (L, T) of the tokens of some images, by their numbers.
        """
        statistics = Statistics.zeros(self.tower)
        by_shape = self.tower.family.keeps_shape
        for batch in in_lists(numbered, self.options.batch_size, lambda item: item[1].shape, by_shape=by_shape):
            (images,) = batched((image for _, image in batch), self.options.batch_size)
            numbers = [number for number, _ in batch]
            are_known = all(number in known_norms for number in numbers)
            statistics += statistics_of(
                self.tower,
                images,
                numbers,
                self.detection,
                norms=torch.stack([known_norms[number] for number in numbers], 1) if are_known else None,
                score=self.options.score,
                sparsity_filter=self.options.sparsity_filter,
                seed=self.options.seed,
            )
            on_images(len(batch))
        return functools.reduce(operator.add, gathered(statistics))


def views_of(model: nn.Module | Sequence[nn.Module], images: Images, options: Options) -> list[View]:
    """A view of each model, with images that are not read yet.

    Raises:
        RuntimeError: a model is patched.
        ValueError: the models, transforms and images do not fit together.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    transform = options.transform
    transforms = list(transform) if isinstance(transform, Sequence) else [transform] * len(models)
    if not models or len(transforms) != len(models):
        raise ValueError(f"{len(models)} models and {len(transforms)} transforms: give one transform for each")
    towers = [find_tower(each) for each in models]
    if any(is_patched(each) for each in models):
        raise RuntimeError("the model is patched: calibrate it before, or after testreg.unpatch(model)")
    weights = fingerprint(towers[0])
    if any(compare_weights(weights, tower) == "other" for tower in towers[1:]):
        raise ValueError("several models must be one checkpoint at several image sizes, but their weights differ")
    if isinstance(images, Iterator) and (len(models) > 1 or options.resume is not None):
        raise ValueError("several models, and resumed runs, need images that can be read again: not an iterator")
    for one, tower in zip(models, towers, strict=True):
        warn_of_activation(one, tower)
    options = options.with_blocks_of(towers[0].depth)
    views = []
    for each, tower, own in zip(models, towers, transforms, strict=True):
        stream = ImageStream(
            images,
            own or OwnTransform(each),
            tower=tower,
            num_images=options.num_images,
            workers=options.workers,
            seed=options.seed,
        )
        views.append(View(each, tower, stream, options))
    return views


@contextmanager
def evaluating(views: Sequence[View]) -> Iterator[None]:
    """Within the context the models are in eval mode, and under autocast if the options say so."""
    with ExitStack() as stack:
        for view in views:
            stack.enter_context(view.tower.evaluating())
        if (amp := views[0].options.amp) is not None:
            stack.enter_context(torch.autocast(views[0].tower.device.type, amp))
        yield


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


def mean_scores(views: Sequence[View], score: Score, statistics: Sequence[Statistics]) -> Tensor:
    """Scores (L, H) of the neurons by the views' statistics: their mean over the views that show outliers."""
    pairs = list(zip(views, statistics, strict=True))
    showing = [pair for pair in pairs if pair[1].num_with_outliers > 0] or pairs
    return torch.stack([scores(found, view.tower, score) for view, found in showing]).mean(0)


def stability_of(views: Sequence[View], score: Score, last: int, count: int | None = None) -> tuple[float, int]:
    """Share of the best neurons that the rankings by two halves of the images have in common, and their number."""
    first, second = (mean_scores(views, score, [view.statistics.half(index) for view in views]) for index in (0, 1))
    return overlap(first, second, last, count)
