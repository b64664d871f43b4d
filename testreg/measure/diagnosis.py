"""The result of a diagnosis: what was measured, the verdict and notes in words, a table, and the JSON.

*Outliers* are patch tokens whose norm is far above the others' of their image. The residual stream is measured at *hook
points*: in front of the first block, and after the attention and after the MLP of each block. The *ratio* of a token is
its norm over the median norm of the image's patches. The *excess norm* of outliers is how far their ratios are above 1.
A *sink* is a set of tokens that draw much attention. *Prefix tokens* are those in front of the patches, such as CLS.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from testreg.display import html
from testreg.files import plain, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "testreg-diagnosis"
VERSION = 1

NO_OP = 0.2  # a sink is a no-op if the norm of its values is below this share of the median norm of the patches' values
# Outliers begin and end where they have half of their largest excess norm. MLPs make them if they add at least half of
# it. A position is fixed if it is an outlier in at least half of the images. Outliers are fixed if at least half of
# them lie at such positions.
HALF = 0.5
BORDER = 0.9  # a note tells if at least this share of the outliers is in the border, the outermost rows and columns
# Fixed positions are looked for in at least this many images. If 2 % of the patches of each image are outliers at
# random, only 1 position in 100,000 is an outlier in half of 8 images.
MIN_IMAGES = 8
NUM_POSITIONS = 4  # the verdict and the notes name at most this many positions; the JSON has all

QUANTILES = (0.01, 0.25, 0.75, 0.99)
"""The levels of `Residual.quantiles`."""

LEGEND: tuple[tuple[str, str], ...] = (
    ("norm", "length of a patch: median of an image, mean over the images"),
    ("norm / median", "99th percentile, largest patch, and largest prefix token"),
    ("prefx", "prefix tokens: CLS and trained registers"),
    ("kurtosis", "of patch norms: 3 if normal, large if a few stand out"),
    ("outliers %", "of the patches, after attention and after the MLP"),
    ("cosine", "to the neighbours: of normal patches, and of outliers"),
)
"""Explains the terms in the table of the residual stream: (term, meaning)."""
ATTENTION_LEGEND: tuple[tuple[str, str], ...] = (
    ("attention, %", "to prefix tokens; to outliers; that in the head with most"),
    ("column ratio", "attention that a patch draws from afar: largest over median"),
    ("value", "norm of outliers' values over the median: 0 in a no-op sink"),
    ("rank", "dimensions of what tokens take from outliers"),
)
"""Explains the terms in the table of attention: (term, meaning)."""

Part = Literal["embedding", "attention", "MLP", "block"]
"""The part of a model that outliers come from; "block" where attention and MLP cannot be told apart."""
Kind = Literal["none", "movable", "fixed", "immovable", "left"]
"""What kind of outliers a model has, see `Outliers.kind` and `Diagnosis.kind`."""
SinkKind = Literal["no-op", "broadcast"]
"""Why heads attend to a sink, see `Sink.kind`."""


@dataclass(frozen=True)
class Residual:
    """The residual stream at one hook point."""

    median_norm: float
    """The median norm of an image's patches, averaged over the images."""
    quantiles: list[float]
    """The quantiles of the ratios of all patches, at the levels `QUANTILES`; exact to 0.5 %."""
    max_over_median: float
    """The largest ratio of an image's patches, averaged over the images."""
    kurtosis: float | None
    """The kurtosis of the ratios of all patches: 3 for a normal distribution, None if all ratios are equal."""
    outlier_fraction: float
    """The fraction of the patches that are outliers here."""
    outlier_ratio: float | None
    """The mean ratio of the outliers; None if there are no outliers."""
    outlier_cosine: float | None
    """The mean cosine similarity of an outlier to its neighbours (4, in an image); None if there are no outliers."""
    normal_cosine: float | None
    """The mean cosine similarity of a patch that is no outlier to its neighbours (4, in an image)."""
    massive_channels: list[tuple[int, float]]
    """The 3 channels, at most, whose |mean| over the outliers is over 10 times the median channel's, the largest first.
    Each comes with its share of the outliers' squared norm."""
    prefix_ratio: list[float]
    """The ratio of each prefix token, averaged over the images."""


@dataclass(frozen=True)
class AttentionHead:
    """What an attention head of a block does with the patches that are outliers in the block's input.

    Attention is averaged over the queries; the attention of each query sums to 1.
    """

    outlier_attention: float
    """The share of the head's attention that goes to outliers."""
    value_ratio: float | None
    """The norm of an outlier's value over the median norm of the patches' values, averaged over the outliers; None if
    there are no outliers, or if values could not be observed."""
    broadcast_rank: float | None
    """The effective rank of what tokens take from outliers (values times attention): 1 if all tokens take the same
    direction, at most the width of the head. It is exp of the entropy of the singular values (Roy and Vetterli,
    2007)."""


@dataclass(frozen=True)
class BlockDiagnosis:
    """What was measured in one block.

    Attention is averaged over the heads and the queries; the attention of each query sums to 1. Only a sample of the
    patches are queries (see `Diagnosis.attention_queries`). What could not be observed is None.
    """

    after_attention: Residual | None
    """The residual stream after the attention; None also if the block adds attention and MLP to it at once."""
    after_mlp: Residual
    """The residual stream after the MLP, which is the block's output."""
    outlier_attention: float | None
    """The share of attention that goes to patches that are outliers in the block's input."""
    prefix_attention: list[float] | None
    """The share of attention that goes to each prefix token."""
    column_ratio: float | None = None
    """The largest attention that a patch of an image draws from afar, over the median of the patches, averaged over the
    images. "From afar" leaves out the attention of the patch itself and of the patches around it (eight, in an
    image)."""
    value_ratio: float | None = None
    """The mean of the heads' `value_ratio`, weighted by the attention that each head gives to outliers; None also if
    there are no outliers."""
    broadcast_rank: float | None = None
    """The mean of the heads' `broadcast_rank`, with the same weights."""
    heads: list[AttentionHead] | None = None
    """What each head does with outliers."""


@dataclass(frozen=True)
class Sink:
    """The attention to outliers, in the block where they draw most."""

    block: int
    attention: float
    """The share of the block's attention that goes to outliers."""
    head: int
    """The head that gives most attention to outliers."""
    head_attention: float
    """The share of this head's attention that goes to outliers."""
    value_ratio: float | None
    """The norm of the outliers' values over the median norm of the patches' values, as in `BlockDiagnosis`."""
    broadcast_rank: float | None
    """The effective rank of what tokens take from outliers, as in `BlockDiagnosis`."""

    @property
    def kind(self) -> SinkKind | None:
        """Why heads attend to the outliers; None if values could not be observed.

        "no-op": to add next to nothing, since the outliers' values are near zero. "broadcast": to read what the
        outliers hold.
        """
        if self.value_ratio is None:
            return None
        return "no-op" if self.value_ratio < NO_OP else "broadcast"

    @property
    def summary(self) -> str:
        """The attention and the kind of sink, in a sentence."""
        drawn = (
            f"They draw up to {self.attention:.0%} of a block's attention (block {self.block}; "
            f"{self.head_attention:.0%} in head {self.head})"
        )
        if self.value_ratio is None or self.broadcast_rank is None:
            return f"{drawn}."
        values = f"{self.value_ratio:.2f} x the median norm"
        if self.kind == "no-op":
            return f"{drawn}, and their values have next to nothing to give ({values}): a no-op sink."
        rank = f"effectively {self.broadcast_rank:.1f} dimensions of a head"
        return f"{drawn}, and their values have {values}: tokens take from them what lies in {rank}."


@dataclass(frozen=True)
class EmbeddingPosition:
    """A position in the grid of patches whose mean norm in front of the first block stands out."""

    row: int
    column: int
    ratio: float
    """Its ratio in front of the first block, averaged over the images."""
    time: int | None = None
    """Its place in time; frames that one patch of a clip spans count as one place. None in images."""

    @property
    def position(self) -> tuple[int, ...]:
        """(row, column), or (time, row, column) in a clip."""
        return _position(self)


@dataclass(frozen=True)
class StandingEmbeddings:
    """Position embeddings that stand out among those of all positions, which `testreg.repair` replaces."""

    positions: list[tuple[int, int]]
    """Rows and columns, on the grid that the model has embeddings for: images of another size have another."""
    norms: list[float]
    median_norm: float
    """The median norm of the embeddings of all positions."""
    grid: tuple[int, int]
    """Rows and columns of that grid."""

    @property
    def summary(self) -> str:
        """Where they are, how large, and what to do, in a sentence."""
        many, highest = len(self.positions) > 1, max(self.norms)
        rows, columns = self.grid
        return (
            f"{'Position embeddings' if many else 'A position embedding'} of {'norms up to' if many else 'norm'} "
            f"{highest:.1f}, {highest / self.median_norm:.0f} x the median, stand{'' if many else 's'} out at "
            f"{positions_in_words(self.positions)} of {rows} x {columns}: testreg.repair(model) puts the mean of "
            f"{'their' if many else 'its'} neighbours in {'their' if many else 'its'} place."
        )


@dataclass(frozen=True)
class FixedPosition:
    """A position in the grid of patches that is an outlier in at least half of the images."""

    row: int
    column: int
    images: float
    """The fraction of the images in which it is an outlier."""
    embedding_ratio: float
    """Its ratio in front of the first block, averaged over the images; high if its position embedding stands out."""
    in_border: bool = False
    """Whether it is in the outermost rows or columns; False if these have half of the patches or more."""
    is_embedding: bool = False
    """Whether it is among `Diagnosis.embedding_positions`."""
    time: int | None = None
    """Its place in time; frames that one patch of a clip spans count as one place. None in images."""
    is_repairable: bool = False
    """Whether it comes from an embedding that `testreg.repair` replaces: see `Diagnosis.standing_embeddings`."""

    @property
    def position(self) -> tuple[int, ...]:
        """(row, column), or (time, row, column) in a clip."""
        return _position(self)


@dataclass(frozen=True)
class Outliers:
    """The outliers after the block at which they stand out most, where they come from, and where they end."""

    block: int
    """The block after which they stand out most (their excess norm is largest there), or the one that the user
    chose."""
    fraction: float
    """The fraction of the patches that are outliers after `block`."""
    onset_block: int
    """The block that has the `onset_part`; 0 if this is the embedding."""
    onset_part: Part
    """The first part of the model after which they have half of their largest excess norm."""
    fade_block: int | None
    """The first later block after which less than half of their largest excess norm is left; None if there is no such
    block."""
    mlp_share: float | None
    """The share of their largest excess norm that MLPs add; attention and the embedding add the rest. None if attention
    and MLPs cannot be told apart."""
    fixed_share: float | None
    """The share of the outliers that lie at fixed positions; None if there are fewer than `MIN_IMAGES` images."""
    fixed_positions: list[FixedPosition]
    border_share: float | None = None
    """The share of the outliers that lie in the border, the outermost rows and columns. None if there are fewer than
    `MIN_IMAGES` images, or if the border has half of the patches or more."""
    sink: Sink | None = None
    """The attention to the outliers. None if they draw hardly more than other patches, or if attention was not
    observed."""
    first_block: int | None = None
    """The first of the successive blocks with outliers around `block`; None if there are outliers in front of the first
    block."""
    last_block: int | None = None
    """The last of these blocks."""

    @property
    def kind(self) -> Kind:
        """Whether registers can remove the outliers: they can if the outliers are "movable".

        "movable": MLPs make them (or may, if `mlp_share` is None), at positions that depend on the image. "fixed": they
        lie at fixed positions. "immovable": something else than MLPs makes them.
        """
        if self.fixed_share is not None and self.fixed_share >= HALF:
            return "fixed"
        by_mlp = self.onset_part != "embedding" and (self.mlp_share is None or self.mlp_share >= HALF)
        return "movable" if by_mlp else "immovable"

    @property
    def is_repairable(self) -> bool:
        """Whether the outliers are fixed, and all their fixed positions come from embeddings that `testreg.repair`
        replaces."""
        return self.kind == "fixed" and all(each.is_repairable for each in self.fixed_positions)

    @property
    def summary(self) -> str:
        """What the outliers are and where they come from, in one line, without a verdict."""
        if self.kind != "fixed":
            return f"outliers from {self.origin}, {100 * self.fraction:.1f} % of patches"
        where = " in the border" if all(each.in_border for each in self.fixed_positions) else ""
        return f"fixed-position artefacts{where} from {self.origin} at {positions_in_words(self.positions)}"

    @property
    def positions(self) -> list[tuple[int, ...]]:
        """The fixed positions: (row, column), or (time, row, column) in clips."""
        return [each.position for each in self.fixed_positions]

    def course(self, blocks: Sequence[BlockDiagnosis]) -> str:
        """Where the outliers appear, are strongest and end, in a sentence; `blocks` are those of the diagnosis."""
        first, last = self.first_block, self.block if self.last_block is None else self.last_block
        parts = [
            "are there in front of the first block" if first is None else f"appear after block {first}",
            f"are strongest after block {self.block}",
        ]
        if first == self.block:
            parts = [f"appear after block {first}, where they are strongest"]
        if last < len(blocks) - 1:
            parts.append(f"are gone after block {last + 1}")
        elif last > self.block:
            share = f"{100 * blocks[last].after_mlp.outlier_fraction:.1f} %"
            parts.append(f"are still there after block {last}, the last ({share} of the patches)")
        else:
            parts[-1] += ", the last"
        return f"Outliers {', '.join(parts[:-1])}{', and ' if parts[1:] else ''}{parts[-1]}."

    @property
    def origin(self) -> str:
        """Where the outliers come from, in words."""
        if self.onset_part == "embedding":
            stand_out = self.kind == "fixed" and all(each.is_embedding for each in self.fixed_positions)
            return "position embeddings that stand out" if stand_out else "the embedding"
        where = f"block {self.onset_block if self.first_block is None else self.first_block}"
        return where if self.onset_part == "block" else f"{where} ({self.onset_part})"


@dataclass(frozen=True)
class PrefixRole:
    """A prefix token with a norm as high as an outlier's: it plays the role that outliers play in other models."""

    token: int
    """The number of the token, from 0."""
    block: int
    """The block after which its norm is highest."""
    ratio: float
    """Its ratio after this block."""
    attention: float | None
    """The largest share of attention that it draws in any block; None if attention could not be observed."""
    is_register: bool = False
    """Whether it is a trained register."""

    @property
    def name(self) -> str:
        """The token in words."""
        token = f"prefix token {self.token}"
        return f"trained register ({token})" if self.is_register else token


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """What `diagnose` measured and concluded. Its length is the number of blocks.

    Example:
        >>> diagnosis = testreg.diagnose(model, images, progress=False)
        >>> isinstance(diagnosis, testreg.Diagnosis), len(diagnosis)
        (True, 4)
        >>> diagnosis
        Diagnosis: outliers from block 2 (MLP), ... % of patches, movable
          of timm:vit_base_patch16_clip_224...: 4 blocks, 45 images at 64 x 64
          Outliers appear after block 2, ...
        >>> figure = diagnosis.plot()
        >>> print(diagnosis.notes[0])
        Outliers appear after block 2, and are strongest after block 3, the last.
        >>> diagnosis.save("diagnosis.json")
    """

    model: Mapping[str, Any]
    """The checkpoint, as in `RegisterNeurons.model`."""
    patched: bool
    """Whether the model was patched when it was measured."""
    images: int
    """How many images were measured."""
    unreadable_images: int
    image_size: list[int]
    """Height and width in pixels, of the last image."""
    rule: str
    """The outlier rule, in words."""
    embedding: Residual
    """The residual stream in front of the first block."""
    blocks: list[BlockDiagnosis]
    outliers: Outliers | None
    """The outliers; None if there is no block after which at least 0.1 % of the patches are outliers."""
    prefix_roles: list[PrefixRole]
    """The prefix tokens whose norm is as high as an outlier's."""
    trained_registers: int = 0
    """How many of the prefix tokens are trained registers; these are the last ones."""
    embedding_positions: list[EmbeddingPosition] = field(default_factory=list)
    """The positions whose mean norm in front of the first block stands out by the default rule, as it does if position
    embeddings stand out. The list is empty if there are fewer than `MIN_IMAGES` images."""
    attention_queries: int | None = None
    """How many patches of an image, at most, were queries when attention was measured: a random sample with a fixed
    seed. All other tokens were queries too. None if attention was not measured."""
    num_frames: int | None = None
    """How many frames a clip has, if clips were measured and not images."""
    standing_embeddings: StandingEmbeddings | None = None
    """Position embeddings that stand out by themselves, whatever is added to them; None if there are none."""
    repaired: bool = False
    """Whether `testreg.repair` has replaced position embeddings of the model."""

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
        """Two lines: what was measured; and the first note, or the rule if there are no notes."""
        height, width = self.image_size
        patched = ", patched" if self.patched else ""
        images = "images" if self.num_frames is None else f"clips of {self.num_frames} frames"
        measured = f"{self.images} {images} at {height} x {width}"
        return [
            f"of {plain(self.model['name'])}{patched}: {len(self)} blocks, {measured}",
            self.notes[0] if self.notes else f"outliers: {self.rule}",
        ]

    def plot(self) -> Figure:
        """Draw the norms of patches and the fraction of outliers after each block, as a matplotlib figure."""
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
        """What kind of outliers the model has: "none", or the kind of its outliers (see `Outliers.kind`).

        "left" takes the place of "movable" if the model is patched: its registers did not remove these outliers.
        """
        if self.outliers is None:
            return "none"
        return "left" if self.patched and self.outliers.kind == "movable" else self.outliers.kind

    @property
    def verdict(self) -> str:
        """What the outliers are, and whether registers can remove them, in one line."""
        outliers = self.outliers
        if outliers is None:
            roles = [f"{role.name}, {role.ratio:.0f} x the median norm" for role in self.prefix_roles]
            return "no outliers: nothing to fix" + (f" (their role is taken by {'; '.join(roles)})" if roles else "")
        fate = {
            "movable": ", movable",
            "left": ", left by the registers",
            "fixed": ": a register does not fix them"
            + (", testreg.repair(model) does" if outliers.is_repairable else ""),
            "immovable": ", not made by MLPs: a register does not move them",
        }
        return outliers.summary + fate[self.kind]

    @property
    def notes(self) -> list[str]:
        """What else was measured, in sentences: where outliers begin and end, their attention, fixed positions."""
        outliers, notes = self.outliers, []
        if outliers is not None:
            notes.append(outliers.course(self.blocks))
            if outliers.sink is not None:
                notes.append(outliers.sink.summary)
            if outliers.mlp_share is not None and outliers.kind != "fixed":
                notes.append(f"MLPs add {outliers.mlp_share:.0%} of their excess norm.")
            if channels := self.blocks[outliers.block].after_mlp.massive_channels:
                named_channels = ", ".join(f"{channel} ({share:.0%})" for channel, share in channels)
                notes.append(f"Of their squared norm, most is in few channels: {named_channels}.")
            if outliers.fixed_share is None:
                notes.append(f"Fixed positions are not looked for in fewer than {MIN_IMAGES} images of one size.")
            for each in outliers.fixed_positions[:NUM_POSITIONS]:
                in_time = "Row" if each.time is None else f"Time {each.time}, row"
                notes.append(
                    f"{in_time} {each.row}, column {each.column} is an outlier in {each.images:.0%} of the images, "
                    f"with {each.embedding_ratio:.2f} x the median norm in front of the first block."
                )
            if outliers.border_share is not None and outliers.border_share >= BORDER:
                notes.append(f"{outliers.border_share:.0%} of them lie in the outermost rows and columns.")
        if self.embedding_positions:
            highest = max(each.ratio for each in self.embedding_positions)
            positions = positions_in_words([each.position for each in self.embedding_positions])
            notes.append(
                f"Position embeddings stand out in front of the first block, with up to {highest:.1f} x the median "
                f"norm: {positions}."
            )
        if self.standing_embeddings is not None:
            notes.append(self.standing_embeddings.summary)
        for role in self.prefix_roles:
            drawn = "" if role.attention is None else f", and draws up to {role.attention:.0%} of the attention"
            name = role.name[:1].upper() + role.name[1:]
            notes.append(f"{name} has {role.ratio:.1f} x the median norm after block {role.block}{drawn}.")
        if self.trained_registers:
            notes.append(self._registers_in_words())
        if any(block.after_attention is None for block in self.blocks):
            notes.append("What attention adds and what the MLP adds is not told apart in every block.")
        if any(block.outlier_attention is None for block in self.blocks):
            notes.append("Attention could not be observed in every block.")
        if self.patched:
            notes.append("The model is patched.")
        if self.repaired:
            notes.append("Position embeddings of the model are repaired.")
        return notes

    def _registers_in_words(self) -> str:
        """The norm and the attention of the trained registers, beside those of the other prefix tokens."""
        count = len(self.blocks[0].after_mlp.prefix_ratio)
        first = count - self.trained_registers
        parts = []
        for kind, tokens in (("trained register", range(first, count)), ("other prefix token", range(first))):
            if not tokens:
                continue
            ratios = [block.after_mlp.prefix_ratio[token] for block in self.blocks for token in tokens]
            drawn = [sum(block.prefix_attention[t] for t in tokens) for block in self.blocks if block.prefix_attention]
            attention = f" and {max(drawn):.0%} of the attention" if drawn else ""
            have = " has" if len(tokens) == 1 else "s have"
            parts.append(f"{len(tokens)} {kind}{have} up to {max(ratios):.1f} x the median norm{attention}")
        return f"{'; '.join(parts)}, in the block where that is most."

    def table(self) -> str:
        """The figures as text: a table of the residual stream, one of attention if that was observed, and what the
        terms mean.

        Each table has a line for each block. Fractions of outliers are given after the attention and after the MLP, all
        other figures of the residual stream after the MLP.
        """
        lines = [
            f"{'':9} {'median':>7} {'norm / median':^17} {'kurt-':>5}  {'outliers %':^11}  {'cosine':^11}",
            f"{'block':>9} {'norm':>7} {'p99':>5} {'max':>5} {'prefx':>5} {'osis':>5}  {'attn':>5} {'MLP':>5}  "
            f"{'norml':>5} {'outl.':>5}",
            _row("embedding", None, self.embedding),
        ]
        for i, block in enumerate(self.blocks):
            after_attention = None if block.after_attention is None else block.after_attention.outlier_fraction
            lines.append(_row(str(i), after_attention, block.after_mlp))
        legend = LEGEND
        if any(block.outlier_attention is not None for block in self.blocks):
            legend += ATTENTION_LEGEND
            lines += [
                "",
                f"{'':9} {'attention, %':^17}  {'column':>6}  {'of outliers':^11}",
                f"{'block':>9} {'prefx':>5} {'outl.':>5} {'head':>5}  {'ratio':>6}  {'value':>5} {'rank':>5}",
            ]
            lines += [_attention_row(str(i), block) for i, block in enumerate(self.blocks)]
        width = max(len(term) for term, _ in legend) + 2
        return "\n".join([*lines, "", *(f"  {term:<{width}}{meaning}" for term, meaning in legend)])

    def to_json(self) -> dict[str, Any]:
        """All figures, and the verdict, as an object of JSON."""
        return {"format": FORMAT, "version": VERSION, "verdict": self.verdict, "kind": self.kind, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON. An existing file is replaced only once the new one is complete."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _position(each: EmbeddingPosition | FixedPosition) -> tuple[int, ...]:
    return (each.row, each.column) if each.time is None else (each.time, each.row, each.column)


def positions_in_words(positions: Sequence[tuple[int, ...]]) -> str:
    """Positions (row, column), or (time, row, column) in clips, as text; at most `NUM_POSITIONS` are named."""
    more = f" and {len(positions) - NUM_POSITIONS} more" if len(positions) > NUM_POSITIONS else ""
    return ", ".join(map(str, positions[:NUM_POSITIONS])) + more


def _row(name: str, fraction_after_attention: float | None, after: Residual) -> str:
    """A line of the table of the residual stream, whose other figures are those of `after`."""
    return (
        f"{name:>9} {_short(after.median_norm):>7} {_short(after.quantiles[-1])} {_short(after.max_over_median)} "
        f"{_short(max(after.prefix_ratio, default=None))} {_short(after.kurtosis)}  "
        f"{_short(_percent(fraction_after_attention))} "
        f"{_short(_percent(after.outlier_fraction))}  {_short(after.normal_cosine)} {_short(after.outlier_cosine)}"
    )


def _attention_row(name: str, block: BlockDiagnosis) -> str:
    """A line of the table of attention."""
    to_prefix = None if block.prefix_attention is None else sum(block.prefix_attention)
    most = max((head.outlier_attention for head in block.heads or ()), default=None)
    shares = " ".join(_short(_percent(share)) for share in (to_prefix, block.outlier_attention, most))
    of_outliers = f"{_short(block.value_ratio)} {_short(block.broadcast_rank)}"
    return f"{name:>9} {shares}  {_short(block.column_ratio):>6}  {of_outliers}"


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _short(value: float | None) -> str:
    """A number in five characters, or "-" for None."""
    if value is None:
        return f"{'-':>5}"
    size = abs(value)
    form = ".2f" if size < 9.995 else ".1f" if size < 99.95 else ".0f" if size < 99999.5 else ".0e"
    return f"{value:>5{form}}"
