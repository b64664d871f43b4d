"""What is known of how a list of register neurons was found: the records of a calibration, as the neuron JSON has them.

Lists that others published say less, and say it in words of their own: most entries may be missing.
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
    """Outliers left after `worst_block`, as a fraction of those before. Such an outlier exceeds the limit of its image
    both as the plain and as the patched model sees it."""
    worst_block: Index
    """The block, from the onset on, after which most outliers are left."""
    excess: Number
    """Excess norm that the plain model's outliers keep, as a fraction of what they had, after the block from the onset
    on where that is most. The excess of a patch is how far its norm is above the normal one of its image (median + 5
    robust sigma), over the latter. Unlike a count, it tells whether neurons were left out that matter."""
    change_pooled: Number
    """1 - cosine between the last block's CLS tokens without and with registers, or between the means of the normal
    patches where there is no CLS. What all images have in common is subtracted first: it would hide any change."""
    change_patches: Number
    """1 - cosine between the normal patches without and with registers, likewise."""
    agreement: Number | None = None
    """Fraction of the images that the user's head gives the same class as before; None without a head."""
    num_registers: Index = 1
    """How many registers the neurons were moved to; each holds all of them."""
    sink: Number | None = None
    """Attention of all tokens to a former outlier, over that to another patch, in the block behind the onset where this
    is largest: 1 is any patch. Norms can be normal while attention still sinks into these patches. None where attention
    cannot be seen."""
    hottest: Number | None = None
    """Attention of CLS (of all patches, where there is none) to the hottest patch of an image, as a share of that to
    all patches, in the last block; mean over the images."""
    hotter: Number | None = None
    """Share of the images whose hottest patch is hotter than without registers."""
    unlike: Number | None = None
    """How unlike their four neighbours the former outliers are (1 - cosine), as a share of what it was; mean over the
    blocks from the onset on."""

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
    """Effects of the best 1, 2, 4, ... of the round's ranking, and of the sizes between which the choice was made, each
    with the neurons of the rounds before."""
    effect: Annotated[Effect, INLINE]
    """Of all neurons that were moved by the end of the round."""


@dataclass(frozen=True)
class PlainAttention(Record):
    """What the plain model gives where an `Effect` has the same of the patched one."""

    sink: Number | None = None
    hottest: Number | None = None


@dataclass(frozen=True)
class Verification(Record):
    """What the chosen neurons do at one image size, on images that had no part in the ranking."""

    image_size: Size
    """Height and width in pixels."""
    dtype: Text
    """In which the model computed, e.g. "bfloat16"."""
    grid: GridSize
    """Rows and columns of patches; of clips, how many there are in time, rows and columns."""
    images: Index
    outlier_fraction: Number
    """Share of the plain model's patches that are outliers after the detection block."""
    effect: Annotated[Effect, INLINE]
    before: PlainAttention | None = None
    """None in older lists, which say nothing of attention."""


@dataclass(frozen=True)
class Stability(Record):
    """How far the rankings by two halves of the images agree, see `testreg.measure.ranking.overlap`."""

    overlap: Number
    """Share of the best neurons that both have."""
    neurons: Index
    """How many these are."""


@dataclass(frozen=True)
class FixedPositions(Record):
    """Patches that do not count as outliers: they are outliers in all images, and neurons do not make them so."""

    grid: GridSize
    positions: tuple[Position, ...]
    """Row and column of each; of clips, time, row and column."""


@dataclass(frozen=True)
class Calibration(Record):
    """How a list of register neurons was found, and what was measured; None, or nothing, for what is not known.

    Example:
        >>> calibration = testreg.RegisterNeurons.load("demo").calibration
        >>> calibration.images, calibration.target_met, len(calibration.verified_at)
        (128, True, 2)
    """

    source: Text | None = None
    """Where the images were from."""
    image_size: Size | None = None
    """Height and width in pixels, of the first image size that shows outliers."""
    rule: Text | None = None
    """What counted as an outlier, in words."""
    score: Text | None = None
    """What the neurons were ranked by."""
    sparsity_filter: Flag | None = None
    seed: Integer | None = None
    dtype: Text | None = None
    images: Index | None = None
    """How many the neurons were ranked on."""
    held_out: Index | None = None
    """How many were put aside, to choose and to verify on."""
    unreadable_images: Index | None = None
    verdict: Text | None = None
    """What the diagnosis says of the outliers."""
    ignored: tuple[FixedPositions, ...] = ()
    detection_block: Index | None = None
    """The block after which outliers were detected."""
    onset_block: Index | None = None
    """The block after which the outliers are there."""
    max_block: Index | None = None
    """The last block whose neurons were ranked."""
    outlier_fraction: Number | None = None
    """Share of the patches that are outliers."""
    images_with_outliers: Index | None = None
    stability: Stability | None = None
    out_of_time: tuple[Text, ...] = ()
    """What the budget cut short, see `testreg.calibration.budget.Cut`."""
    curve: tuple[Effect, ...] = ()
    """The effects that were measured while neurons were added, in all rounds, by their number."""
    chosen: Effect | None = None
    registers: tuple[Effect, ...] = ()
    """Effects of the chosen neurons with 1, 2, ... registers, as far as these were measured."""
    rounds: tuple[Round, ...] = ()
    target: Number | None = None
    """Outliers that may be left, as a fraction of those before."""
    target_met: Flag | None = None
    verified_on_others: Flag | None = None
    """Whether the images that verify had no part in the choice."""
    max_change: Number | None = None
    """How much features may change; None for any."""
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
        """Whether anything is."""
        return self != Calibration()
