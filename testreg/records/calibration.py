"""The records of a calibration: how a list of register neurons was found, and what was measured.

The neuron JSON of the list contains them.

*Outliers* are patches with huge norms; the *onset block* is the block after which they first have most of their norm.
*Register neurons* are MLP neurons that cause outliers. A neuron is *moved* when its activation is taken from the
patches and placed on extra tokens, the registers. The *plain* model is the model without registers.

Most entries may be missing: lists that others published say less, or have other entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from testreg.records.record import (
    INLINE,
    Flag,
    GridSize,
    Index,
    Integer,
    ListedNeuron,
    ListedStart,
    Number,
    Object,
    Position,
    Record,
    Size,
    Text,
)


@dataclass(frozen=True)
class Effect(Record):
    """What moving some neurons does, measured on held-out images.

    *Former outliers* are the patches that are outliers of the plain model after the onset block or a later block.
    """

    neurons: Index
    """How many neurons were moved."""
    remaining: Number
    """The number of outliers of the patched model after `worst_block`, as a fraction of those of the plain model. A
    patch of the patched model is an outlier if its norm exceeds the limits of both models."""
    worst_block: Index
    """The block, from the onset block on, after which this fraction is largest."""
    excess: Number
    """The excess norm of the plain model's outliers in the patched model, as a fraction of their excess norm in the
    plain model, after the block from the onset block on where this fraction is largest. The excess norm of a patch is
    how far its norm is above the largest normal norm of its image (median + 5 robust sigma), divided by this norm. It
    shows whether important neurons are missing even when outliers are just below the limit, and no longer counted."""
    change_pooled: Number
    """How much the pooled features change: 1 - cosine between the CLS tokens after the last block of the plain and the
    patched model, averaged over the images. Without CLS, the mean of normal patches takes its place. The mean over all
    images is subtracted first, since it would hide any change."""
    change_patches: Number
    """How much the features of normal patches change: 1 - cosine, as in `change_pooled`."""
    agreement: Number | None = None
    """The fraction of the images to which the user's head gives the same class as in the plain model; None without a
    head."""
    num_registers: Index = 1
    """How many registers the neurons were moved to. Each register holds the activations of all neurons."""
    sink: Number | None = None
    """The attention that a former outlier draws from all tokens, over what another patch draws, in the block behind the
    onset block where this is largest. It is 1 if former outliers draw as much as other patches. It can be high even
    when norms are normal. None if attention cannot be observed, or if there are no former outliers."""
    hottest: Number | None = None
    """The share of CLS' attention to patches that goes to the hottest patch, the one that gets most, in the last block;
    averaged over the images. Without CLS, the mean attention of all patches takes its place. None where `sink` is."""
    hotter: Number | None = None
    """The share of the images whose hottest patch gets more attention than in the plain model, by more than 1 %."""
    unlike: Number | None = None
    """How little former outliers resemble their neighbours, four in an image (1 - cosine), as a fraction of the same in
    the plain model; averaged over the blocks from the onset block on."""
    start: ListedStart = "zeros"
    """How the registers started: as zeros in block 0, or as the mean of their image's patches in the first block that
    has register neurons."""

    @property
    def change(self) -> float:
        """The larger of `change_pooled` and `change_patches`."""
        return max(self.change_pooled, self.change_patches)


@dataclass(frozen=True)
class Round(Record):
    """A round of the search for register neurons: which neurons it added, and what was measured to decide it."""

    round: Index
    """The number of the round, from 1."""
    added: tuple[ListedNeuron, ...]
    """The neurons that the round added."""
    curve: tuple[Effect, ...]
    """The effects of moving the best 1, 2, 4, ... neurons of the round's ranking, or numbers between these. The neurons
    of earlier rounds are always moved as well."""
    effect: Annotated[Effect, INLINE]
    """The effect of moving the neurons that this round and all earlier rounds added."""


@dataclass(frozen=True)
class PlainAttention(Record):
    """The attention figures of the plain model, see `Effect.sink` and `Effect.hottest`."""

    sink: Number | None = None
    hottest: Number | None = None


@dataclass(frozen=True)
class Verification(Record):
    """What moving the chosen neurons does at one image size, on images that had no part in the ranking."""

    image_size: Size
    """Height and width in pixels."""
    dtype: Text
    """The dtype in which the model computed, e.g. "bfloat16"."""
    grid: GridSize
    """How many rows and columns of patches an image has; for clips, how many times, rows and columns."""
    images: Index
    """How many images were measured."""
    outlier_fraction: Number
    """The fraction of the plain model's patches that are outliers after `Calibration.detection_block`."""
    effect: Annotated[Effect, INLINE]
    before: PlainAttention | None = None
    """The attention figures of the plain model; None in older lists, which have none."""


@dataclass(frozen=True)
class Stability(Record):
    """How far the rankings by two halves of the images agree, as `testreg.measure.ranking.overlap` measures it."""

    overlap: Number
    """The share of the best neurons that is among the best by one half of the images, averaged over both halves."""
    neurons: Index
    """How many of the best neurons were compared."""


@dataclass(frozen=True)
class FixedPositions(Record):
    """Positions at which patches do not count as outliers: they have high norms whatever the image shows."""

    grid: GridSize
    """The grid of patches, see `Verification.grid`."""
    positions: tuple[Position, ...]
    """The row and column of each position; in clips, its time, row and column."""


@dataclass(frozen=True)
class Calibration(Record):
    """How a list of register neurons was found, and what was measured. Entries that are not known are None or empty.

    Example:
        >>> calibration = testreg.RegisterNeurons.load("demo").calibration
        >>> calibration.images, calibration.target_met, len(calibration.verified_at)
        (128, True, 2)
    """

    source: Text | None = None
    """Where the images came from."""
    image_size: Size | None = None
    """Height and width in pixels, of the first image size with outliers that neurons can move."""
    rule: Text | None = None
    """The rule that decided which patches are outliers, in words."""
    score: Text | None = None
    """The name of the score by which neurons were ranked."""
    sparsity_filter: Flag | None = None
    """The option of this name, see `testreg.calibrate`."""
    seed: Integer | None = None
    """The option of this name."""
    dtype: Text | None = None
    """The dtype in which the model computed, e.g. "bfloat16"."""
    images: Index | None = None
    """How many images ranked the neurons."""
    held_out: Index | None = None
    """How many images were held out, to choose and to verify the neurons."""
    unreadable_images: Index | None = None
    verdict: Text | None = None
    """The verdict of the diagnosis: what the outliers are, and whether moving neurons removes them."""
    ignored: tuple[FixedPositions, ...] = ()
    """Positions at which patches did not count as outliers, for each grid of patches."""
    detection_block: Index | None = None
    """The block after which outliers were detected."""
    onset_block: Index | None = None
    """The onset block."""
    max_block: Index | None = None
    """The last block whose neurons were ranked."""
    outlier_fraction: Number | None = None
    """The fraction of the patches that are outliers after `detection_block`, in the images that ranked the neurons."""
    images_with_outliers: Index | None = None
    """How many of the images that ranked the neurons have outliers."""
    stability: Stability | None = None
    out_of_time: tuple[Text, ...] = ()
    """The steps that the budget cut short, see `testreg.calibration.budget.Step`."""
    curve: tuple[Effect, ...] = ()
    """The effects that were measured while neurons were added, in all rounds, sorted by the number of neurons."""
    chosen: Effect | None = None
    """The effect of the chosen neurons, with the chosen number of registers."""
    registers: tuple[Effect, ...] = ()
    """The effects of moving the chosen neurons to 1, 2, ... registers that start as zeros, as far as they were
    measured; and then to some numbers of registers that start as the mean of their image's patches."""
    rounds: tuple[Round, ...] = ()
    target: Number | None = None
    """How many outliers may be left, as a fraction of those of the plain model."""
    target_met: Flag | None = None
    """Whether at most `target` of the outliers are left, on the images that verify the neurons, at each image size."""
    verified_on_others: Flag | None = None
    """Whether the neurons were measured last on images that had no part in choosing them."""
    max_change: Number | None = None
    """How much features may change (`Effect.change`); None if there is no limit."""
    dropped: tuple[ListedNeuron, ...] = ()
    """Neurons that a round added, and that were later dropped: the set is as good without them."""
    verified_at: tuple[Verification, ...] = ()
    """What verified the chosen neurons, at each image size."""
    made_at: Text | None = None
    """The time at which the list was made, in UTC and ISO format."""
    versions: Object = field(default_factory=dict[str, Any])
    """The versions of Python and of the packages that were used, by name."""
    is_sparse: ClassVar[bool] = True

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the calibration."""
        return self != Calibration()
