"""Rank the MLP neurons by how far they cause the outliers, the patches with huge norms.

The ranking is computed from sums over images (`testreg.measure.ranking`). They are kept apart for two halves of the
images. Images are read in chunks; once the rankings by the two halves agree, the ranking is *stable* and reading ends.

A *view* is the model at one image size. The *diagnosed* images are the first images of a view, which are in memory. A
neuron is *moved* when its activation is taken from the patches and placed on extra tokens, the registers.

Shapes: L blocks with H neurons each; T tokens of an image.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from testreg.calibration.budget import Budget
from testreg.calibration.detect import Detected, leader_of
from testreg.calibration.options import Options
from testreg.calibration.resume import CHUNK, FIRST_CHUNK, State
from testreg.io.images import batched, in_lists
from testreg.io.processes import all_gather
from testreg.io.progress import progress_bar
from testreg.measure.ranking import SUMS, Statistics, overlap, statistics_of
from testreg.neurons import Neuron, unscored
from testreg.register import patched

NUM_RANKED_AGAIN = 16  # at most this many images with outliers rank again in each process once some neurons are moved
# While the diagnosed images are read, ranking may end only after so many images with outliers, and a quarter of
# this number in each half.
MIN_RANKED = 16


@dataclass(frozen=True, eq=False)
class Ranked:
    """What `rank` returns: the outliers of each view, and the sums from which neurons are scored."""

    detected: Sequence[Detected]
    """The outliers of each view."""
    statistics: Sequence[Statistics]
    """The sums of each view, over the images of all processes."""

    @property
    def leader(self) -> Detected:
        """The leading view, see `leader_of`."""
        return leader_of(self.detected)

    @property
    def leader_statistics(self) -> Statistics:
        """The sums of the leading view, over both halves of its images."""
        return self.statistics[self.detected.index(self.leader)].total()

    def totals(self) -> list[Statistics]:
        """The sums of each view, over both halves of its images."""
        return [each.total() for each in self.statistics]

    def totals_with(self, moved: Sequence[Neuron]) -> list[Statistics]:
        """The sums of each view of a model in which the neurons `moved` are moved to a register.

        They are taken over at most `NUM_RANKED_AGAIN` diagnosed images with outliers in each process.
        """
        return [_statistics_with(each, moved) for each in self.detected]

    def scores(self, totals: Sequence[Statistics]) -> Tensor:
        """The scores (L, H) of the neurons, averaged over the views that have outliers, or over all if none has.

        Args:
            totals: the sums of each view.
        """
        pairs = list(zip(self.detected, totals, strict=True))
        with_outliers = [pair for pair in pairs if pair[1].num_with_outliers > 0] or pairs
        return torch.stack([total.scores(each.tower) for each, total in with_outliers]).mean(0)

    def stability(self, last: int, count: int | None = None) -> tuple[float, int]:
        """How far the rankings of the blocks up to `last` by the two halves of the images agree.

        `overlap` explains `count` and what is returned.
        """
        first, second = (self.scores([each.half(index) for each in self.statistics]) for index in (0, 1))
        return overlap(first, second, last, count)


def rank(detected: Sequence[Detected], options: Options, budget: Budget, state: State) -> Ranked:
    """Read images in chunks, and add up the sums by which neurons are ranked, until the ranking is stable.

    Reading also ends when all images are read, or when the budget is spent. `state` may hold the sums of an interrupted
    run: its images are not run again.
    """
    unread = [each.split.to_rank(state.num_done) for each in detected]
    end_of_diagnosed = detected[0].split.rest_start

    def ranked_so_far() -> Ranked:
        return Ranked(detected, tuple(state.statistics))

    def all_are_read() -> bool:
        """Whether all processes have read all their images."""
        return all(all_gather(all(each.is_empty for each in unread)))

    def is_stable() -> bool:
        """Whether the rankings by the two halves agree, and enough images with outliers were read to tell."""
        if options.stability is None:
            return False
        with_outliers = torch.stack([each.num_with_outliers for each in state.statistics]).sum(0)  # (2,), of each half
        if state.num_done < end_of_diagnosed and min(with_outliers.sum(), 4 * with_outliers.min()) < MIN_RANKED:
            return False
        share_in_common, _ = ranked_so_far().stability(last_blocks(leader_of(detected), options)[0])
        return share_in_common >= options.stability

    with progress_bar("ranking", detected[0].view.stream.length, options.progress) as bar:
        while not state.num_done or not (all_are_read() or is_stable() or budget.is_spent("ranking")):
            state.num_done += FIRST_CHUNK if state.num_done < end_of_diagnosed else CHUNK
            for index, each in enumerate(detected):
                on_images = bar.update if index == 0 else _ignore
                state.statistics[index] += _statistics_of(each, unread[index].take(state.num_done), on_images)
            state.save()
    return ranked_so_far()


def last_blocks(leader: Detected, options: Options) -> tuple[int, int]:
    """The last block whose neurons are ranked: in the first round of the choice, and in all later rounds."""
    if options.max_block is not None:
        return options.max_block, options.max_block
    # By attribution, a neuron that fires only because of outliers scores low. So late blocks can be ranked at once.
    if options.score == "attribution":
        last = max(leader.detection.block, *leader.blocks_with_outliers)
        return last, last
    return leader.onset, leader.detection.block


def _statistics_with(detected: Detected, moved: Sequence[Neuron]) -> Statistics:
    """The sums of one view of a model in which some neurons are moved, over a few diagnosed images.

    At most `NUM_RANKED_AGAIN` in each process are used, and only images that had outliers: in the others there is
    nothing left to find.
    """
    with patched(detected.view.model, unscored(moved)):
        images = itertools.islice(detected.with_outliers(), NUM_RANKED_AGAIN)
        return _statistics_of(detected, images, _ignore, norms_are_known=False).total()


def _statistics_of(
    detected: Detected,
    numbered_images: Iterator[tuple[int, Tensor]],
    on_images: Callable[[int], object],
    *,
    norms_are_known: bool = True,
) -> Statistics:
    """The sums over the numbered images of this process, and of all other processes.

    Args:
        on_images: called after each batch with how many images it had.
        norms_are_known: whether `detected.norms` may be used; they are no longer true once neurons are moved.
    """
    options, known = detected.view.options, (detected.norms if norms_are_known else {})
    statistics = SUMS[options.score].zeros(detected.tower)
    by_shape = detected.tower.family.keeps_shape
    for batch in in_lists(numbered_images, options.batch_size, lambda item: item[1].shape, by_shape=by_shape):
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
    """Do nothing with the number of images, where no progress is shown."""
