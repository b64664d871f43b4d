"""Rank the neurons by how far they cause the outliers, on one chunk of images after the other until the ranking is
stable."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from testreg.calibration.budget import Budget
from testreg.calibration.detect import Detected, leading
from testreg.calibration.options import Options
from testreg.calibration.resume import CHUNK, FIRST_CHUNK, State
from testreg.io.images import batched, in_lists
from testreg.io.processes import all_gather
from testreg.io.progress import progress_bar
from testreg.measure.ranking import SUMS, Statistics, overlap, statistics_of
from testreg.neurons import Neuron, unscored
from testreg.register import patched

NUM_RANKED_AGAIN = 16  # images with outliers by which each process ranks anew, once some neurons are moved
MIN_RANKED = 16  # images with outliers, a quarter of them in each half, before ranking may stop within the first images


@dataclass(frozen=True, eq=False)
class Ranked:
    """The outliers of each view, and the sums over its images by which the neurons are ranked."""

    detected: Sequence[Detected]
    statistics: Sequence[Statistics]
    """Of each view, over the images of all processes."""

    @property
    def leader(self) -> Detected:
        return leading(self.detected)

    @property
    def leader_statistics(self) -> Statistics:
        """The sums of the leading view, without the axis of halves."""
        return self.statistics[self.detected.index(self.leader)].total()

    def totals(self) -> list[Statistics]:
        """The sums of each view, without the axis of halves."""
        return [each.total() for each in self.statistics]

    def totals_with(self, moved: Sequence[Neuron]) -> list[Statistics]:
        """The sums of each view with some neurons moved, over `NUM_RANKED_AGAIN` of the first images."""
        return [_statistics_with(each, moved) for each in self.detected]

    def scores(self, totals: Sequence[Statistics]) -> Tensor:
        """Scores (L, H) of the neurons, from the sums of each view: the mean over the views that show outliers."""
        pairs = list(zip(self.detected, totals, strict=True))
        showing = [pair for pair in pairs if pair[1].num_with_outliers > 0] or pairs
        return torch.stack([total.scores(each.tower) for each, total in showing]).mean(0)

    def stability(self, last: int, count: int | None = None) -> tuple[float, int]:
        """How far the rankings by two halves of the images agree, and on how many neurons: see `overlap`."""
        first, second = (self.scores([each.half(index) for each in self.statistics]) for index in (0, 1))
        return overlap(first, second, last, count)


def rank(detected: Sequence[Detected], options: Options, budget: Budget, state: State) -> Ranked:
    """Rank by one chunk of images after the other, until two halves of the images agree on the best neurons, or all
    images are read. What `state` holds of an interrupted run is not computed again.
    """
    unread = [each.split.to_rank(state.done) for each in detected]
    end_of_first = detected[0].split.end

    def ranked() -> Ranked:
        return Ranked(detected, tuple(state.statistics))

    def is_read() -> bool:
        return all(all_gather(all(each.is_empty for each in unread)))

    def is_stable() -> bool:
        if options.stability is None:
            return False
        with_outliers = torch.stack([each.num_with_outliers for each in state.statistics]).sum(0)  # of either half
        if state.done < end_of_first and min(with_outliers.sum(), 4 * with_outliers.min()) < MIN_RANKED:
            return False
        return ranked().stability(last_blocks(leading(detected), options)[0])[0] >= options.stability

    with progress_bar("ranking", detected[0].view.stream.length, options.progress) as bar:
        while not state.done or not (is_read() or is_stable() or budget.is_spent("ranking")):
            state.done += FIRST_CHUNK if state.done < end_of_first else CHUNK
            for index, each in enumerate(detected):
                on_images = bar.update if index == 0 else _ignore
                state.statistics[index] += _statistics_of(each, unread[index].take(state.done), on_images)
            state.save()
    return ranked()


def last_blocks(leader: Detected, options: Options) -> tuple[int, int]:
    """The block up to which neurons are ranked in the first round, and in all others."""
    if options.max_block is not None:
        return options.max_block, options.max_block
    if options.score == "attribution":  # a neuron that fires only because of outliers scores low: late blocks may count
        last = max(leader.detection.block, *leader.blocks_with_outliers)
        return last, last
    return leader.onset, leader.detection.block


def _statistics_with(detected: Detected, moved: Sequence[Neuron]) -> Statistics:
    """The statistics with some neurons moved, over both halves of some of the first images. Only images with outliers
    are taken, since others hide no second cause."""
    with patched(detected.view.model, unscored(moved)):
        images = itertools.islice(detected.with_outliers(), NUM_RANKED_AGAIN)
        return _statistics_of(detected, images, _ignore, norms_are_known=False).total()


def _statistics_of(
    detected: Detected,
    numbered: Iterator[tuple[int, Tensor]],
    on_images: Callable[[int], object],
    *,
    norms_are_known: bool = True,
) -> Statistics:
    """The statistics of this process's numbered images, summed with those of the other processes.

    Args:
        on_images: called with the number of images after each batch.
        norms_are_known: whether `detected.norms` are valid; they are not once neurons are moved.
    """
    options, known = detected.view.options, (detected.norms if norms_are_known else {})
    statistics = SUMS[options.score].zeros(detected.tower)
    by_shape = detected.tower.family.keeps_shape
    for batch in in_lists(numbered, options.batch_size, lambda item: item[1].shape, by_shape=by_shape):
        (images,) = batched((image for _, image in batch), options.batch_size)
        numbers = [number for number, _ in batch]
        norms = [known[number] for number in numbers if number in known]
        statistics += statistics_of(
            detected.tower,
            images,
            numbers,
            detected.detection,
            norms=torch.stack(norms, 1) if len(norms) == len(numbers) else None,
            score=options.score,
            sparsity_filter=options.sparsity_filter,
            seed=options.seed,
        )
        on_images(len(batch))
    return functools.reduce(operator.add, all_gather(statistics))


def _ignore(count: int) -> None:
    """Take a number of images, where no progress is shown."""
