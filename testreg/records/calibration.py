"""The records of a calibration: how a list of register neurons was found, as the neuron JSON has it.

Most entries may be missing, since lists that others published say less, and have entries of their own.
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
    Number,
    Object,
    Position,
    Record,
    Size,
    Text,
)


@dataclass(frozen=True)
class Effect(Record):
    """What moving some neurons does, on held-out images.

    The *former outliers* are the patches that are outliers of the plain model, after any block from the onset on.
    """

    neurons: Index
    remaining: Number
    """Outliers left after `worst_block`, as a fraction of those before. A patch counts as one if its norm exceeds the
    limit of the image in the plain model and that in the patched model."""
    worst_block: Index
    """The block, from the onset on, after which the largest fraction of the outliers is left."""
    excess: Number
    """Excess norm that the plain model's outliers keep, as a fraction of what they had, after the block from the onset
    on where this is largest. The excess of a patch is how far its norm is above the normal one of its image (median + 5
    robust sigma), divided by the latter. Unlike a count, it shows whether neurons are missing that matter."""
    change_pooled: Number
    """1 - cosine between the last block's CLS tokens without and with registers, or between the means of the normal
    patches where there is no CLS. The mean over all images is subtracted first, since it would hide any change."""
    change_patches: Number
    """The same between the normal patches without and with registers."""
    agreement: Number | None = None
    """Fraction of the images that the user's head gives the same class as before; None without a head."""
    num_registers: Index = 1
    """How many registers the neurons were moved to; each holds all of them."""
    sink: Number | None = None
    """Attention that a former outlier draws from all tokens, over what another patch draws, in the block behind the
    onset where this is largest. 1 means that it draws as much as any patch. Norms can be normal while attention still
    sinks into these patches. None where attention cannot be observed."""
    hottest: Number | None = None
    """Share of CLS' attention to patches that goes to the hottest patch, in the last block; mean over the images. Where
    there is no CLS, the mean over all patches takes its place."""
    hotter: Number | None = None
    """Share of the images whose hottest patch is hotter than without registers."""
    unlike: Number | None = None
    """How unlike their four neighbours the former outliers are (1 - cosine), as a share of the same in the plain model;
    mean over the blocks from the onset on."""

    @property
    def change(self) -> float:
        """The larger of the two changes."""
        return max(self.change_pooled, self.change_patches)


@dataclass(frozen=True)
class Round(Record):
    """What was added to the set of neurons in one round, and what was measured to decide it."""

    round: Index
    """The number of the round, from 1."""
    added: tuple[ListedNeuron, ...]
    curve: tuple[Effect, ...]
    """Effects of the best 1, 2, 4, ... neurons of the round's ranking, and of numbers between these, together with the
    neurons of earlier rounds."""
    effect: Annotated[Effect, INLINE]
    """The effect of all neurons that were moved by the end of the round."""


@dataclass(frozen=True)
class PlainAttention(Record):
    """The attention figures of an `Effect`, but of the plain model."""

    sink: Number | None = None
    hottest: Number | None = None


@dataclass(frozen=True)
class Verification(Record):
    """What the chosen neurons do at one image size, on images that had no part in the ranking."""

    image_size: Size
    """Height and width in pixels."""
    dtype: Text
    """The dtype in which the model computed, e.g. "bfloat16"."""
    grid: GridSize
    """How many patches there are in rows and columns; of clips, in time, rows and columns."""
    images: Index
    outlier_fraction: Number
    """Share of the plain model's patches that are outliers after the detection block."""
    effect: Annotated[Effect, INLINE]
    before: PlainAttention | None = None
    """The attention figures of the plain model; None in older lists, which say nothing of attention."""


@dataclass(frozen=True)
class Stability(Record):
    """How far the rankings by two halves of the images agree, see `testreg.measure.ranking.overlap`."""

    overlap: Number
    """Share of the best neurons that both rankings have in common."""
    neurons: Index
    """How many best neurons were compared."""


@dataclass(frozen=True)
class FixedPositions(Record):
    """Positions that do not count as outliers: they are outliers whatever the image shows, and no neuron makes them."""

    grid: GridSize
    positions: tuple[Position, ...]
    """Row and column of each; of clips, time, row and column."""


@dataclass(frozen=True)
class Calibration(Record):
    """How a list of register neurons was found, and what was measured; unknown entries are None or empty.

    Example:
        >>> calibration = testreg.RegisterNeurons.load("demo").calibration
        >>> calibration.images, calibration.target_met, len(calibration.verified_at)
        (128, True, 2)
    """

    source: Text | None = None
    """Where the images came from."""
    image_size: Size | None = None
    """Height and width in pixels, of the first image size that shows outliers."""
    rule: Text | None = None
    """The outlier rule, in words."""
    score: Text | None = None
    """The score that the neurons were ranked by."""
    sparsity_filter: Flag | None = None
    seed: Integer | None = None
    dtype: Text | None = None
    images: Index | None = None
    """How many images the neurons were ranked by."""
    held_out: Index | None = None
    """How many images were held out, for the choice and for the verification."""
    unreadable_images: Index | None = None
    verdict: Text | None = None
    """The verdict of the diagnosis."""
    ignored: tuple[FixedPositions, ...] = ()
    detection_block: Index | None = None
    """The block after which outliers were detected."""
    onset_block: Index | None = None
    """The first block after which the outliers are there."""
    max_block: Index | None = None
    """The last block whose neurons were ranked."""
    outlier_fraction: Number | None = None
    """Share of the patches that are outliers."""
    images_with_outliers: Index | None = None
    stability: Stability | None = None
    out_of_time: tuple[Text, ...] = ()
    """The steps that the budget cut short, see `testreg.calibration.budget.Step`."""
    curve: tuple[Effect, ...] = ()
    """The effects that were measured while neurons were added, in all rounds, sorted by the number of neurons."""
    chosen: Effect | None = None
    """The effect of the chosen neurons, with the chosen number of registers."""
    registers: tuple[Effect, ...] = ()
    """Effects of the chosen neurons with 1, 2, ... registers, as far as they were measured."""
    rounds: tuple[Round, ...] = ()
    target: Number | None = None
    """Outliers that may be left, as a fraction of those before."""
    target_met: Flag | None = None
    verified_on_others: Flag | None = None
    """Whether it was verified on images that had no part in the choice."""
    max_change: Number | None = None
    """How much features may change; None: without a limit."""
    dropped: tuple[ListedNeuron, ...] = ()
    """Neurons that were added in a round, and then found to have no effect."""
    verified_at: tuple[Verification, ...] = ()
    """What was measured with the chosen neurons, at each image size."""
    made_at: Text | None = None
    versions: Object = field(default_factory=dict[str, Any])
    """Of Python and of the packages that were used."""
    is_sparse: ClassVar[bool] = True

    @property
    def is_known(self) -> bool:
        """Whether anything is known of the calibration."""
        return self != Calibration()
