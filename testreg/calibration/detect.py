"""Which tokens are the outliers, and whether neurons may move them."""

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
    """What measures sets of neurons on held-out images: the same one twice, if there are too few images for two."""

    choosing: EffectMeter
    verifying: EffectMeter


@dataclass(frozen=True, eq=False)
class Detected:
    """The outliers that a view shows."""

    split: Split
    diagnosis: Diagnosis
    """Of the first images, without outliers at the positions that `detection` ignores."""
    norms: Mapping[int, Tensor]
    """Norms (L, T) of the tokens of the first images, by their numbers."""
    detection: Detection
    onset: int
    """The block after which the outliers are there."""
    has_movable: bool
    """Whether neurons may move its outliers. If not, another view says where to look."""

    @property
    def view(self) -> View:
        return self.split.view

    @property
    def tower(self) -> Tower:
        return self.split.view.tower

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.diagnosis.image_size
        return height, width

    @property
    def blocks_with_outliers(self) -> list[int]:
        """The blocks after which the first images have outliers enough to be fixed."""
        blocks = enumerate(self.diagnosis.blocks)
        return [index for index, block in blocks if block.after_mlp.outlier_fraction >= MIN_FRACTION]

    def with_outliers(self) -> Iterator[tuple[int, Tensor]]:
        """The numbers and images (3, h, w) of the first images that have outliers, after the blocks that count."""
        for number, packed in self.split.first:
            image, norms = packed.image, self.norms[number].unsqueeze(1)
            if counted_outliers(self.tower, image.unsqueeze(0), norms, self.detection).any():
                yield number, image

    def meters(self) -> Meters:
        """What measures sets of neurons, to choose one, and to verify it: on others, if there are enough images, and
        else on all."""
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
    """Decide in each view which tokens are the outliers.

    Raises:
        NoOutliersError, ImmovableOutliersError: no view shows any that neurons may move.
    """
    looks = [_look(split, options) for split in splits]
    leader = next((look for look in looks if look.has_movable), None)
    if leader is None:
        raise _nothing_to_move([look.with_fixed for look in looks], options)
    return [_detected(look, look if look.has_movable else leader, options) for look in looks]


def leading(detected: Sequence[Detected]) -> Detected:
    """The first view with outliers that neurons may move: what is said of all views at once is said of it."""
    return next(each for each in detected if each.has_movable)


class _Look(NamedTuple):
    """What a view shows at first sight."""

    split: Split
    with_fixed: Diagnosis
    """Fixed positions included."""
    diagnosis: Diagnosis
    ignored: Positions
    norms: Mapping[int, Tensor]
    has_movable: bool


def _look(split: Split, options: Options) -> _Look:
    ignored: Positions = frozenset()
    with_fixed, norms = _diagnose(split, ignored)
    diagnosis = with_fixed
    # Outliers at the same position in all images say nothing of the neurons that make the others.
    while (outliers := diagnosis.outliers) is not None and outliers.fixed_positions:
        ignored |= set(outliers.positions)
        diagnosis, norms = _diagnose(split, ignored)
    if outliers is None and options.user_chose_block:
        diagnosis, ignored = with_fixed, frozenset()
        outliers = diagnosis.outliers
    has_movable = outliers is not None and (outliers.kind == "movable" or options.user_chose_block)
    return _Look(split, with_fixed, diagnosis, ignored, norms, has_movable)


def _diagnose(split: Split, ignored: Positions) -> tuple[Diagnosis, Mapping[int, Tensor]]:
    """The diagnosis of the first images of all processes, without outliers at the `ignored` positions, and the norms
    (L, T) of the tokens of those of this process, by their numbers."""
    view, options = split.view, split.view.options
    by_shape = view.tower.family.keeps_shape
    batches = batched((packed.image for _, packed in split.first), options.batch_size, by_shape=by_shape)
    norms: list[Tensor] = []  # (L, T) of each image
    with progress_bar("diagnosing", len(split.first), options.progress) as bar:
        seen = observe(
            view.tower,
            batches,
            options.outlier_rule,
            ignored=ignored,
            attention=False,
            on_images=bar.update,
            on_norms=norms.extend,
        )
    of_images = dict(zip((number for number, _ in split.first), norms, strict=True))
    return conclude(view.model, all_gather(seen), options.outlier_rule, block=options.block), of_images


def _detected(look: _Look, leader: _Look, options: Options) -> Detected:
    """What a view shows, where the outliers of the leading one are."""
    outliers = leader.diagnosis.outliers
    assert outliers is not None
    onset = outliers.onset_block
    detection = Detection(options.outlier_rule, outliers.block, look.ignored, onset if options.block is None else None)
    return Detected(look.split, look.diagnosis, look.norms, detection, onset, look.has_movable)


def _nothing_to_move(diagnoses: Sequence[Diagnosis], options: Options) -> NoOutliersError | ImmovableOutliersError:
    for diagnosis in diagnoses:
        if diagnosis.outliers is not None:
            return ImmovableOutliersError(diagnosis.verdict)
    diagnosis = diagnoses[0]
    most = max(block.after_mlp.outlier_fraction for block in diagnosis.blocks)
    rule = options.outlier_rule.describe()
    return NoOutliersError(
        f"{diagnosis.verdict} (at most {most:.3%} of the patches of {diagnosis.images} images, {rule})"
    )
