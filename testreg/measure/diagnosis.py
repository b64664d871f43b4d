"""What a diagnosis says: its records, the verdict and the notes in words, the table, and the JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from testreg.display import html
from testreg.files import plain, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "testreg-diagnosis"
VERSION = 1

HALF = 0.5  # a majority: of the excess norm for onset, fading and maker; of images or outliers for what is fixed
MIN_IMAGES = 8  # chance outliers of 2 % of the patches repeat in half of so many images at 1 position in 100,000
NUM_POSITIONS = 4  # fixed positions named in the verdict and the notes; the JSON has all

QUANTILES = (0.01, 0.25, 0.75, 0.99)

Part = Literal["embedding", "attention", "MLP", "block"]
Kind = Literal["none", "movable", "fixed", "immovable"]


@dataclass(frozen=True)
class Residual:
    """The patches at one hook point of the residual stream.

    Ratios are norms over the median norm of the image's patches.
    """

    median_norm: float
    """The median norm of the patches, mean over the images."""
    quantiles: list[float]
    """The ratios of all patches at `QUANTILES`; exact to 0.5 %."""
    max_over_median: float
    """The largest ratio of an image, mean over the images."""
    kurtosis: float | None
    """The kurtosis of the ratios of all patches: 3 for a normal distribution, None if they are all alike."""
    outlier_fraction: float
    outlier_ratio: float | None
    """Mean ratio of the outliers; None if there are none."""
    outlier_cosine: float | None
    """Mean cosine similarity of an outlier to its 4 neighbours in the grid; None if there are none."""
    normal_cosine: float | None
    """Mean cosine similarity of any other patch to its 4 neighbours."""
    massive_channels: list[tuple[int, float]]
    """Channels whose |mean| at the outliers is over `MASSIVE` times the median channel's, the largest first, each with
    its share of the outliers' squared norm."""
    prefix_ratio: list[float]
    """The ratio of each prefix token, mean over the images."""


@dataclass(frozen=True)
class BlockDiagnosis:
    """One block. Attention is the mean over its heads and queries; each query gives 1 in all."""

    after_attention: Residual | None
    """None where the block does not add attention and MLP to the stream one after the other."""
    after_mlp: Residual
    """The block's output."""
    outlier_attention: float | None
    """Share of attention that goes to patches that are outliers at the block's input; None if not observable."""
    prefix_attention: list[float] | None
    """Share of attention that goes to each prefix token; None if not observable."""


@dataclass(frozen=True)
class FixedPosition:
    """A patch that is an outlier in at least half of the images."""

    row: int
    column: int
    images: float
    """Fraction of the images in which it is an outlier."""
    embedding_ratio: float
    """Its ratio in front of the first block, where position embeddings show; mean over the images."""


@dataclass(frozen=True)
class Outliers:
    """The outliers of the block at whose output they stand out most, and what becomes of them."""

    block: int
    fraction: float
    onset_block: int
    """The block of `onset_part`; 0 for the embedding."""
    onset_part: Part
    """The part after which they have half of the excess norm that they reach; "block" where its parts are not told
    apart."""
    fade_block: int | None
    """The first block behind `block` after which they have less than half of it; None if they stay to the end."""
    mlp_share: float | None
    """Share of that excess that MLPs add, the rest being attention's and the embedding's; None where a block's parts
    are not told apart."""
    fixed_share: float | None
    """Share of the outliers that lie at fixed positions; None of fewer than `MIN_IMAGES` images."""
    fixed_positions: list[FixedPosition]

    @property
    def kind(self) -> Kind:
        """Whether registers move them: they move what MLP neurons write where the image makes them fire."""
        if self.fixed_share is not None and self.fixed_share >= HALF:
            return "fixed"
        by_mlp = self.onset_part != "embedding" and (self.mlp_share is None or self.mlp_share >= HALF)
        return "movable" if by_mlp else "immovable"

    @property
    def summary(self) -> str:
        """What they are, in one line; not whether registers move them."""
        if self.kind != "fixed":
            return f"outliers from {self.origin}, {100 * self.fraction:.1f} % of patches"
        return f"fixed-position artefacts from {self.origin} at {named(self.positions)}"

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Rows and columns of the fixed positions."""
        return [(each.row, each.column) for each in self.fixed_positions]

    @property
    def origin(self) -> str:
        where = f"block {self.onset_block}"
        return {"embedding": "the embedding", "block": where}.get(self.onset_part, f"{where} ({self.onset_part})")


@dataclass(frozen=True)
class PrefixRole:
    """A prefix token (CLS, a trained register) with a norm of outliers: it takes their role."""

    token: int
    block: int
    """The block after which its norm is highest."""
    ratio: float
    attention: float | None
    """The largest share of attention that it draws in a block; None if not observable."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` found. Its length is the number of blocks.

    Example:
        >>> found = testreg.diagnose(model, images, progress=False)
        >>> isinstance(found, testreg.Diagnosis), len(found)
        (True, 4)
        >>> found
        Diagnosis: outliers from block 2 (MLP), ... % of patches, movable
          of timm:vit_base_patch16_clip_224...: 4 blocks, 45 images at 64 x 64
          Outliers stand out most after block ...
        >>> figure = found.plot()
        >>> print(found.notes[0])
        Outliers stand out most after block ...
        >>> found.save("diagnosis.json")
    """

    model: Mapping[str, Any]
    patched: bool
    images: int
    unreadable_images: int
    image_size: list[int]
    rule: str
    embedding: Residual
    """The patches in front of the first block."""
    blocks: list[BlockDiagnosis]
    outliers: Outliers | None
    """None if they are fewer than `MIN_FRACTION` of the patches after every block."""
    prefix_roles: list[PrefixRole]

    def __len__(self) -> int:
        return len(self.blocks)

    def __repr__(self) -> str:
        return "\n  ".join([f"{type(self).__name__}: {self.verdict}", *self._summary()])

    def _repr_html_(self) -> str:
        heads = ("block", "median norm", "max / median", "outliers, % of patches", "attention to outliers, %")
        rows = [
            (
                i,
                block.after_mlp.median_norm,
                block.after_mlp.max_over_median,
                100 * block.after_mlp.outlier_fraction,
                None if block.outlier_attention is None else 100 * block.outlier_attention,
            )
            for i, block in enumerate(self.blocks)
        ]
        return html([f"Diagnosis: {self.verdict}", *self._summary()], heads, rows)

    def _summary(self) -> list[str]:
        """What was measured, and the first of the notes: a line each."""
        height, width = self.image_size
        patched = ", patched" if self.patched else ""
        return [
            f"of {plain(self.model['name'])}{patched}: {len(self)} blocks, {self.images} images at {height} x {width}",
            self.notes[0] if self.notes else f"outliers: {self.rule}",
        ]

    def plot(self) -> Figure:
        """The norms and the outliers after each block: a matplotlib figure."""
        from matplotlib import pyplot as plt
        from matplotlib.ticker import MaxNLocator

        after = [block.after_mlp for block in self.blocks]
        figure, (norms, outliers) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
        norms.plot([each.median_norm * each.max_over_median for each in after], marker=".", label="largest patch")
        norms.plot([each.median_norm for each in after], linestyle="--", label="median patch")
        norms.set(xlabel="block", ylabel="token norm", yscale="log")
        outliers.plot([100 * each.outlier_fraction for each in after], marker=".", label="of the patches")
        if all(block.outlier_attention is not None for block in self.blocks):
            drawn = [100 * (block.outlier_attention or 0.0) for block in self.blocks]
            outliers.plot(drawn, marker=".", linestyle=":", label="of the attention")
        outliers.set(xlabel="block", ylabel="outliers (%)")
        outliers.set_ylim(bottom=0)
        for axis in (norms, outliers):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend()
        plt.close(figure)  # whoever called this shows it; otherwise a notebook would show it twice
        return figure

    @property
    def kind(self) -> Kind:
        return "none" if self.outliers is None else self.outliers.kind

    @property
    def verdict(self) -> str:
        """What the outliers are, and whether registers move them, in one line."""
        found = self.outliers
        if found is None:
            roles = [f"prefix token {role.token}, {role.ratio:.0f} x the median norm" for role in self.prefix_roles]
            return "no outliers: nothing to fix" + (f" (their role is taken by {'; '.join(roles)})" if roles else "")
        fate = {
            "movable": ", movable",
            "fixed": ": a register does not fix them",
            "immovable": ", not made by MLPs: a register does not move them",
        }
        return found.summary + fate[found.kind]

    @property
    def notes(self) -> list[str]:
        """What the verdict leaves out, in sentences."""
        found, notes = self.outliers, []
        if found is not None:
            fade = "stay to the last block" if found.fade_block is None else f"fade in block {found.fade_block}"
            notes.append(f"Outliers stand out most after block {found.block}, and {fade}.")
            if found.mlp_share is not None and found.kind != "fixed":
                notes.append(f"MLPs add {found.mlp_share:.0%} of their excess norm.")
            if channels := self.blocks[found.block].after_mlp.massive_channels:
                named_channels = ", ".join(f"{channel} ({share:.0%})" for channel, share in channels)
                notes.append(f"Of their squared norm, most is in few channels: {named_channels}.")
            if found.fixed_share is None:
                notes.append(f"Fixed positions are not looked for in fewer than {MIN_IMAGES} images of one size.")
            for each in found.fixed_positions[:NUM_POSITIONS]:
                notes.append(
                    f"Row {each.row}, column {each.column} is an outlier in {each.images:.0%} of the images, "
                    f"with {each.embedding_ratio:.2f} x the median norm in front of the first block."
                )
        for role in self.prefix_roles:
            drawn = "" if role.attention is None else f", and draws up to {role.attention:.0%} of the attention"
            notes.append(
                f"Prefix token {role.token} has {role.ratio:.1f} x the median norm after block {role.block}{drawn}."
            )
        if any(block.after_attention is None for block in self.blocks):
            notes.append("What attention adds and what the MLP adds is not told apart in every block.")
        if any(block.outlier_attention is None for block in self.blocks):
            notes.append("Attention could not be observed in every block.")
        if self.patched:
            notes.append("The model is patched.")
        return notes

    def table(self) -> str:
        """The figures as text, a line for each block: those after its MLP, and the outlier fraction after its
        attention."""
        lines = [
            f"{'':9} {'median':>7} {'norm / median':^17} {'kurt-':>5}  {'outliers %':^11}  {'cosine':^11}  "
            f"{'attention %':^11}",
            f"{'block':>9} {'norm':>7} {'p99':>5} {'max':>5} {'prefx':>5} {'osis':>5}  {'attn':>5} {'MLP':>5}  "
            f"{'norml':>5} {'outl.':>5}  {'outl.':>5} {'prefx':>5}",
            _row("embedding", None, self.embedding, None, None),
        ]
        for i, block in enumerate(self.blocks):
            before = None if block.after_attention is None else block.after_attention.outlier_fraction
            drawn = None if block.prefix_attention is None else sum(block.prefix_attention)
            lines.append(_row(str(i), before, block.after_mlp, block.outlier_attention, drawn))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All figures, and the verdict, as JSON holds them."""
        return {"format": FORMAT, "version": VERSION, "verdict": self.verdict, "kind": self.kind, **asdict(self)}

    to_json = to_dict  # as the neurons have it

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def named(positions: Sequence[tuple[int, int]]) -> str:
    """Rows and columns in words; of many, the first."""
    more = f" and {len(positions) - NUM_POSITIONS} more" if len(positions) > NUM_POSITIONS else ""
    return ", ".join(map(str, positions[:NUM_POSITIONS])) + more


def _row(name: str, before: float | None, after: Residual, to_outliers: float | None, to_prefix: float | None) -> str:
    def percent(share: float | None) -> float | None:
        return None if share is None else 100 * share

    return (
        f"{name:>9} {_short(after.median_norm):>7} {_short(after.quantiles[-1])} {_short(after.max_over_median)} "
        f"{_short(max(after.prefix_ratio, default=None))} {_short(after.kurtosis)}  {_short(percent(before))} "
        f"{_short(percent(after.outlier_fraction))}  {_short(after.normal_cosine)} {_short(after.outlier_cosine)}  "
        f"{_short(percent(to_outliers))} {_short(percent(to_prefix))}"
    )


def _short(value: float | None) -> str:
    """A number in five characters."""
    if value is None:
        return f"{'-':>5}"
    size = abs(value)
    form = ".2f" if size < 9.995 else ".1f" if size < 99.95 else ".0f" if size < 99999.5 else ".0e"
    return f"{value:>5{form}}"
