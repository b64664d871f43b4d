"""Detect the outliers of each view, and find out whether moving neurons can remove them.

*Outliers* are patch tokens with huge norms. They are *movable* if MLP neurons make them, at positions that depend on
the image: then moving these neurons to a register removes them from the patches. The *onset block* is the block after
which the outliers first have most of their norm. A *view* is the model at one image size. The *diagnosed* images are
the first images of a view, without those that are held out to choose and verify neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from testreg.calibration.effects import EffectMeter
from testreg.calibration.errors import ImmovableOutliersError, NoOutliersError
from testreg.calibration.options import Options
from testreg.calibration.split import NUM_CHOOSING, Split
from testreg.calibration.view import View
from testreg.families import Tower
from testreg.io.images import batched
from testreg.io.processes import all_gather
from testreg.io.progress import progress_bar
from testreg.measure.attribution import counted_outliers
from testreg.measure.conclusion import conclude
from testreg.measure.diagnosis import Diagnosis
from testreg.measure.observation import observe
from testreg.measure.outliers import MIN_FRACTION, Detection, Position

Positions = frozenset[Position]


class Meters(NamedTuple):
    """The meters that measure what moving a set of neurons does, on held-out images.

    If there are too few held-out images to divide, both are the same meter on all of them.
    """

    choosing: EffectMeter
    verifying: EffectMeter


@dataclass(frozen=True, eq=False)
class Detected:
    """What was detected in a view: which patches are its outliers."""

    split: Split
    diagnosis: Diagnosis
    """The diagnosis of the diagnosed images, without outliers at the positions that `detection` ignores."""
    norms: Mapping[int, Tensor]
    """The norms (L, T) of the T tokens of each diagnosed image after each of L blocks, by the number of the image."""
    detection: Detection
    """Decides which patches count as outliers."""
    onset: int
    """The onset block."""
    has_movable: bool
    """Whether the view has movable outliers, or, if the user chose a block, any outliers. If not, its `detection` and
    `onset` are those of another view."""

    @property
    def view(self) -> View:
        return self.split.view

    @property
    def tower(self) -> Tower:
        return self.split.view.tower

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.diagnosis.image_size
        return height, width

    @property
    def blocks_with_outliers(self) -> list[int]:
        """The blocks after which at least `MIN_FRACTION` of the patches of the diagnosed images are outliers."""
        blocks = enumerate(self.diagnosis.blocks)
        return [index for index, block in blocks if block.after_mlp.outlier_fraction >= MIN_FRACTION]

    def with_outliers(self) -> Iterator[tuple[int, Tensor]]:
        """The numbers of the diagnosed images with outliers, and these images (3, h, w).

        Only outliers that attribution counts are looked at, see `Detection.counts`.
        """
        for number, packed in self.split.diagnosed:
            image, norms = packed.image, self.norms[number].unsqueeze(1)
            if counted_outliers(self.tower, image.unsqueeze(0), norms, self.detection).any():
                yield number, image

    def meters(self) -> Meters:
        """Make the meters that choose and verify sets of neurons on the held-out images."""
        options = self.view.options
        meter = EffectMeter(
            self.view.model,
            self.tower,
            [packed for _, packed in self.split.held_out],
            self.detection,
            self.onset,
            batch_size=options.batch_size,
            head=options.head,
            seed=options.seed,
        )
        return Meters(*meter.split(NUM_CHOOSING)) if self.split.can_verify else Meters(meter, meter)


def detect(splits: Sequence[Split], options: Options) -> list[Detected]:
    """Decide in each view which patches are the outliers.

    Raises:
        NoOutliersError: no view has outliers.
        ImmovableOutliersError: views have outliers, but none that moving neurons could remove.
    """
    diagnosed = [_diagnose_view(split, options) for split in splits]
    leader = next((each for each in diagnosed if each.has_movable), None)
    if leader is None:
        raise _nothing_to_move([each.diagnosis_with_fixed for each in diagnosed], options)
    return [_detected(each, each if each.has_movable else leader, options) for each in diagnosed]


def leader_of(detected: Sequence[Detected]) -> Detected:
    """The leading view: the first with movable outliers. Facts that are recorded once for all views are those of it."""
    return next(each for each in detected if each.has_movable)


class _DiagnosedView(NamedTuple):
    """The diagnosis of a view, before it is known which view leads."""

    split: Split
    diagnosis_with_fixed: Diagnosis
    """The diagnosis with the outliers at fixed positions."""
    diagnosis: Diagnosis
    """The diagnosis without outliers at the `ignored` positions."""
    ignored: Positions
    norms: Mapping[int, Tensor]
    """See `Detected.norms`."""
    has_movable: bool


def _diagnose_view(split: Split, options: Options) -> _DiagnosedView:
    """Diagnose a view again and again, each time without the fixed positions seen before, until there are none left.

    If no outliers are left either, and the user chose a block, no positions are ignored.
    """
    ignored: Positions = frozenset()
    diagnosis_with_fixed, norms = _diagnose_images(split, ignored)
    diagnosis = diagnosis_with_fixed
    # A position that is an outlier in half of the images or more has another cause than neurons, and would hide the
    # other outliers.
    while (outliers := diagnosis.outliers) is not None and outliers.fixed_positions:
        ignored |= set(outliers.positions)
        diagnosis, norms = _diagnose_images(split, ignored)
    if outliers is None and options.user_chose_block:
        diagnosis, ignored = diagnosis_with_fixed, frozenset()
        outliers = diagnosis.outliers
    has_movable = outliers is not None and (outliers.kind == "movable" or options.user_chose_block)
    return _DiagnosedView(split, diagnosis_with_fixed, diagnosis, ignored, norms, has_movable)


def _diagnose_images(split: Split, ignored: Positions) -> tuple[Diagnosis, Mapping[int, Tensor]]:
    """Diagnose the images of all processes, without outliers at the `ignored` positions.

    Returns:
        The diagnosis; the norms (L, T) of the tokens of each image of this process, by the number of the image.
    """
    view, options = split.view, split.view.options
    by_shape = view.tower.family.keeps_shape
    batches = batched((packed.image for _, packed in split.diagnosed), options.batch_size, by_shape=by_shape)
    norms: list[Tensor] = []  # (L, T) for each image
    with progress_bar("diagnosing", len(split.diagnosed), options.progress) as bar:
        observations = observe(
            view.tower,
            batches,
            options.outlier_rule,
            ignored=ignored,
            attention=False,
            on_images=bar.update,
            on_norms=norms.extend,
        )
    norms_by_number = dict(zip((number for number, _ in split.diagnosed), norms, strict=True))
    diagnosis = conclude(view.model, all_gather(observations), options.outlier_rule, block=options.block)
    return diagnosis, norms_by_number


def _detected(view: _DiagnosedView, leader: _DiagnosedView, options: Options) -> Detected:
    """Detect the outliers of a view at the blocks of the outliers of `leader`.

    This is the view itself if it has movable outliers, and else the leading view.
    """
    outliers = leader.diagnosis.outliers
    assert outliers is not None
    onset = outliers.onset_block
    detection = Detection(options.outlier_rule, outliers.block, view.ignored, onset if options.block is None else None)
    return Detected(view.split, view.diagnosis, view.norms, detection, onset, view.has_movable)


def _nothing_to_move(diagnoses: Sequence[Diagnosis], options: Options) -> NoOutliersError | ImmovableOutliersError:
    """The error that says why there are no movable outliers, from the diagnosis of each view."""
    for diagnosis in diagnoses:
        if diagnosis.outliers is not None:
            return ImmovableOutliersError(diagnosis.verdict)
    diagnosis = diagnoses[0]
    most = max(block.after_mlp.outlier_fraction for block in diagnosis.blocks)
    rule = options.outlier_rule.describe()
    return NoOutliersError(
        f"{diagnosis.verdict} (at most {most:.3%} of the patches of {diagnosis.images} images, {rule})"
    )
