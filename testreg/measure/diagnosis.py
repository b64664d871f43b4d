"""What a model's outlier tokens are, before anything is done about them: where they come from, where they lie.

One streaming pass. The residual stream is looked at in front of the blocks, and after the attention and after the MLP
of each: its 2L+1 *places*, for L blocks. All figures follow from sums over images, so that memory is that of a batch,
the batch size does not matter, and several processes (torch.distributed) share the images: `observe` takes the sums
over the images of one process, and `conclude` those of all processes together.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from testreg.families import Tower, find_tower
from testreg.files import replacing
from testreg.io.images import Images, ImageStream, batched
from testreg.io.preprocessing import OwnTransform, Transform
from testreg.io.processes import Sums, add, gathered, rank, world_size
from testreg.io.progress import progress_bar
from testreg.measure.attention import Recorder
from testreg.measure.outliers import MIN_FRACTION, OutlierRule, check_finite, exactly, ignored_patches
from testreg.neurons import describe_model
from testreg.register import is_patched

FORMAT = "testreg-diagnosis"
VERSION = 1

HALF = 0.5  # of the excess norm tells onset, fading and maker; of the images or the outliers, what is fixed: majorities
MIN_IMAGES = 8  # chance outliers of 2 % of the patches repeat in half of so many images at 1 position in 100,000
HIGH_NORM = 5.0  # largest norm over the median: below 2.3 in a model without outliers, 64 in DINOv2-B
MASSIVE = 10.0  # a direction without massive channels (Gaussian, C = 4096) has its largest at 6 times the median
NUM_CHANNELS = 3  # massive channels reported at each place
NUM_POSITIONS = 4  # fixed positions named in the verdict and the notes; the JSON has all

QUANTILES = (0.01, 0.25, 0.75, 0.99)
BIN = math.log(1.01)  # width of a histogram bin: quantiles are exact to half of it, 0.5 %
LOWEST, HIGHEST = math.log(2.0**-7), math.log(2.0**13)  # norms beyond, over the median, count as these
BINS = math.ceil((HIGHEST - LOWEST) / BIN)

Part = Literal["embedding", "attention", "MLP", "block"]
Kind = Literal["none", "movable", "fixed", "immovable"]


@dataclass(frozen=True)
class Residual:
    """The patches at one place of the residual stream. Ratios are norms over the median norm of the image's patches."""

    median_norm: float
    """Mean over the images."""
    quantiles: list[float]
    """Of the ratios of all patches, at `QUANTILES`; exact to 0.5 %."""
    max_over_median: float
    """Mean over the images of the largest ratio."""
    kurtosis: float | None
    """Of the ratios of all patches: 3 for a normal distribution. None if they are all alike."""
    outlier_fraction: float
    outlier_ratio: float | None
    """Mean over the outliers, as the next; None if there are none."""
    outlier_cosine: float | None
    """Mean cosine similarity of an outlier to its 4 neighbours in the grid."""
    normal_cosine: float | None
    """The same of the other patches."""
    massive_channels: list[tuple[int, float]]
    """Channels whose |mean| at the outliers is over `MASSIVE` times the median channel's, the largest first, each with
    its share of the outliers' squared norm."""
    prefix_ratio: list[float]
    """Of each prefix token, mean over the images."""


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
    """Share that goes to each prefix token."""


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
    """0 for the embedding."""
    onset_part: Part
    """After which they have half of the excess norm that they reach; "block" where its parts are not told apart."""
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
        """Registers move what MLP neurons write where the image makes them fire."""
        if self.fixed_share is not None and self.fixed_share >= HALF:
            return "fixed"
        by_mlp = self.onset_part != "embedding" and (self.mlp_share is None or self.mlp_share >= HALF)
        return "movable" if by_mlp else "immovable"

    @property
    def summary(self) -> str:
        """What they are, in one line; not what becomes of them."""
        if self.kind != "fixed":
            return f"outliers from {self.origin}, {100 * self.fraction:.1f} % of patches"
        return f"fixed-position artefacts from {self.origin} at {named(self.positions)}"

    @property
    def positions(self) -> list[tuple[int, int]]:
        """Rows and columns of the fixed ones."""
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
    """After which its norm is highest."""
    ratio: float
    attention: float | None
    """The largest share of attention that it draws in a block; None if not observable."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found."""

    model: Mapping[str, Any]
    patched: bool
    images: int
    unreadable_images: int
    image_size: list[int]
    rule: str
    embedding: Residual
    """In front of the first block."""
    blocks: list[BlockDiagnosis]
    outliers: Outliers | None
    """None if they are fewer than `MIN_FRACTION` of the patches after every block."""
    prefix_roles: list[PrefixRole]

    @property
    def kind(self) -> Kind:
        return "none" if self.outliers is None else self.outliers.kind

    @property
    def verdict(self) -> str:
        """In one line."""
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
        """A line for each block, as text: figures after its MLP, and the outlier fraction after its attention too."""
        lines = [
            f"{'':>9} {'median':>8} {'--- norm / median ---':>24} {'kurt-':>7} {'- outliers, % -':>15} "
            f"{'--- cosine ---':>15} {'- attention, % -':>16}  {'prefix':>6}",
            f"{'block':>9} {'norm':>8} {'p1':>7} {'p99':>7} {'mean max':>8} {'osis':>7} {'attention':>9} {'MLP':>5} "
            f"{'normal':>7} {'outlier':>7} {'outliers':>9} {'prefix':>6}  {'norm':>6}  massive channels",
            _row("embedding", None, self.embedding, None, None),
        ]
        for i, block in enumerate(self.blocks):
            before = None if block.after_attention is None else block.after_attention.outlier_fraction
            drawn = None if block.prefix_attention is None else sum(block.prefix_attention)
            lines.append(_row(str(i), before, block.after_mlp, block.outlier_attention, drawn))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "verdict": self.verdict, "kind": self.kind, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON; an existing file is replaced whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def named(positions: Sequence[tuple[int, int]]) -> str:
    """Rows and columns in words; of many, the first."""
    more = f" and {len(positions) - NUM_POSITIONS} more" if len(positions) > NUM_POSITIONS else ""
    return ", ".join(map(str, positions[:NUM_POSITIONS])) + more


def _row(name: str, before: float | None, after: Residual, to_outliers: float | None, to_prefix: float | None) -> str:
    def cell(value: float | None, width: int, form: str, factor: float = 1.0) -> str:
        return f"{'-' if value is None else format(factor * value, form):>{width}}"

    cells = [
        f"{name:>9}",
        cell(after.median_norm, 8, ".4g"),
        cell(after.quantiles[0], 7, ".2f"),
        cell(after.quantiles[-1], 7, ".2f"),
        cell(after.max_over_median, 8, ".2f"),
        cell(after.kurtosis, 7, ".1f"),
        cell(before, 9, ".1f", 100),
        cell(after.outlier_fraction, 5, ".1f", 100),
        cell(after.normal_cosine, 7, ".2f"),
        cell(after.outlier_cosine, 7, ".2f"),
        cell(to_outliers, 9, ".1f", 100),
        cell(to_prefix, 6, ".1f", 100),
        "",
        cell(max(after.prefix_ratio, default=None), 5, ".1f"),
        "",
        ", ".join(f"{channel} ({share:.0%})" for channel, share in after.massive_channels),
    ]
    return " ".join(cells).rstrip()


def diagnose(
    model: nn.Module,
    images: Images,
    *,
    transform: Transform | None = None,
    batch_size: int = 16,
    num_images: int | None = None,
    rule: OutlierRule | None = None,
    block: int | None = None,
    ignored: Collection[tuple[int, int]] = (),
    workers: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Look at the outlier tokens of `model`, and tell whether registers would move them, in one pass over `images`.

    The processes of torch.distributed share the images: all must call this, and all get the same result.

    Args:
        model: a vision tower, or any model that contains one, on the device that it is on. A patched model is looked
            at as it computes, without its registers: there should be no outliers left.
        images: a folder, a Dataset, or any iterable of PIL images or tensors (see `testreg.io.images.ImageStream`).
        transform: PIL image -> tensor (3, h, w); None takes the preprocessing that the model's own library names.
        rule: which patches are outliers.
        block: at whose output to judge the outliers; None for the one where they stand out most.
        ignored: positions (row, column) that do not count as outliers, such as the fixed ones of another diagnosis.

    Raises:
        ValueError: an argument does not fit the model; no image could be read; norms are not finite.
    """
    tower = find_tower(model)
    rule = rule or OutlierRule()
    if block is not None and not 0 <= block < tower.depth:
        raise ValueError(f"block={block} is out of range: the model has {tower.depth} blocks")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    stream = ImageStream(images, transform or OwnTransform(model), num_images=num_images, workers=workers, seed=seed)
    batches = batched((image for _, image in stream.numbered(0, rank(), world_size())), batch_size)
    with progress_bar("diagnosing", stream.length, progress) as bar:
        seen = observe(tower, batches, rule, ignored=ignored, on_images=bar.update)
    seen.unreadable_images = stream.num_skipped
    all_seen = gathered(seen)
    if all(each.image_size is None for each in all_seen):
        skipped = sum(each.unreadable_images for each in all_seen)
        unreadable = f": all {skipped} were unreadable" if skipped else ""
        raise ValueError(f"no image could be read from {stream.source}{unreadable}")
    return conclude(model, all_seen, rule, block=block)


def observe(
    tower: Tower,
    batches: Iterable[Tensor],
    rule: OutlierRule,
    *,
    ignored: Collection[tuple[int, int]] = (),
    on_images: Callable[[int], object] = lambda count: None,
) -> Observations:
    """What a tower shows on batches (B, 3, h, w), of which there may be none, in this process alone.

    Args:
        on_images: called with the number of images after each batch.

    Raises:
        ValueError: norms are not finite.
    """
    seen = Observations(tower.depth)
    with tower.evaluating():
        for batch in batches:
            _accumulate(seen, tower, batch, rule, ignored)
            on_images(len(batch))
    return seen


def conclude(
    model: nn.Module, parts: Sequence[Observations], rule: OutlierRule, *, block: int | None = None
) -> Diagnosis:
    """The diagnosis from what was observed of `model` on some images, by this process or by several.

    Args:
        parts: changed by this; one at least has seen an image.
    """
    tower = find_tower(model)
    sums = functools.reduce(Observations.add, parts)
    assert sums.image_size is not None
    residuals = [_residual(place) if place else None for place in sums.places]
    embedding, *_ = residuals
    assert embedding is not None
    blocks = _blocks(residuals, sums.attention)
    return Diagnosis(
        model=describe_model(model, tower),
        patched=is_patched(model),
        images=int(sums.places[0]["images"]),
        unreadable_images=sums.unreadable_images,
        image_size=sums.image_size,
        rule=rule.describe(),
        embedding=embedding,
        blocks=blocks,
        outliers=_outliers(sums, blocks, block),
        prefix_roles=_prefix_roles(blocks),
    )


# The pass -------------------------------------------------------------------------------------------------------------


class Observations:
    """Sums over images, in float64 on the CPU. Place 0 is in front of the blocks, 2i+1 and 2i+2 are of block i."""

    def __init__(self, depth: int) -> None:
        self.image_size: list[int] | None = None
        """Height and width of the last image; None before the first."""
        self.unreadable_images = 0
        self.places: list[Sums] = [{} for _ in range(2 * depth + 1)]
        """Empty where there is nothing to see."""
        self.attention: list[Sums] = [{} for _ in range(depth)]
        self.excess = torch.zeros(depth, 2 * depth + 1, dtype=torch.float64)
        """[d, p]: over the outliers after block d, of ratio - 1 at place p; NaN where there is nothing to see."""
        self.positions: defaultdict[tuple[int, int], Sums] = defaultdict(dict)
        """Per patch, by the grid of patches, since images may be of several sizes."""

    def add(self, other: Observations) -> Observations:
        """Adds the sums over other images, in place."""
        self.image_size = other.image_size or self.image_size
        self.unreadable_images += other.unreadable_images
        pairs = zip(self.places + self.attention, other.places + other.attention, strict=True)
        for mine, theirs in (*pairs, *((self.positions[grid], more) for grid, more in other.positions.items())):
            add(mine, theirs)
        self.excess += other.excess
        return self


@torch.no_grad()
def _accumulate(
    sums: Observations, tower: Tower, images: Tensor, rule: OutlierRule, ignored: Collection[tuple[int, int]]
) -> None:
    """Add one batch (B, 3, h, w) to the sums."""
    sums.image_size = list(images.shape[-2:])
    watch = _Watch(sums, tower, images, rule, ignored)
    with watch.installed():
        tower.run(images)
    ratios = torch.stack(
        [torch.full_like(watch.ratios[0], math.nan) if ratio is None else ratio for ratio in watch.ratios]
    )  # (2L+1, B, N)
    outlier = torch.stack(watch.outlier[2::2]).float()  # (L, B, N)
    with exactly(outlier.device):
        sums.excess += torch.einsum("dbn,pbn->dp", outlier, ratios - 1).cpu().double()
    counts = {"events": outlier.sum(1), "embedding": ratios[0].sum(0), "images": torch.tensor(len(images))}
    add(sums.positions[watch.grid], counts)


class _Watch:
    """Looks at one batch as it passes through the blocks, and adds what it sees to the sums."""

    def __init__(
        self,
        sums: Observations,
        tower: Tower,
        images: Tensor,
        rule: OutlierRule,
        ignored: Collection[tuple[int, int]],
    ) -> None:
        self.sums, self.tower, self.images, self.rule, self.ignored = sums, tower, images, rule, ignored
        self.ratios: list[Any] = []  # of each place (B, N), or None
        self.outlier: list[Any] = []  # masks of the same shape
        self.entered: Tensor | None = None  # the tokens (B, T, C) that the running block got
        self.residual_sum = _ResidualSum()
        self.attention = Recorder(of_all=True)

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns; not asked for before a block runs, so that towers which take no images say so first."""
        return self.tower.grid(self.images)

    @property
    def patches(self) -> slice:
        """The tokens that are patches."""
        rows, columns = self.grid
        return slice(self.tower.num_prefix, self.tower.num_prefix + rows * columns)

    @contextmanager
    def installed(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, block in enumerate(self.tower.blocks):
                before = block.module.register_forward_pre_hook(self._before_block, with_kwargs=True)
                after = block.module.register_forward_hook(functools.partial(self._after_block, layer))
                downs = [mlp.fc2.register_forward_hook(self.residual_sum.start) for mlp in block.mlps]
                for handle in (before, after, *downs):
                    stack.callback(handle.remove)
            stack.enter_context(self.residual_sum)
            stack.enter_context(self.attention)
            yield

    def _before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = args[0] if args else next(iter(kwargs.values()))
        self.entered = self.tower.batch_first(tokens)
        if not self.ratios:
            self._look(self.entered)
        self.residual_sum.clear()
        self.attention.rows.clear()

    def _after_block(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = self.tower.batch_first(output[0] if isinstance(output, tuple) else output)
        if self.attention.rows:
            drawn = torch.stack([rows.mean(1) for rows in self.attention.rows]).mean(0)  # (B, T)
            to_outliers = (drawn[:, self.patches] * self.outlier[-1]).sum()
            to_prefix = drawn[:, : self.tower.num_prefix].sum(0)
            images = torch.tensor(len(drawn))
            add(self.sums.attention[layer], {"outliers": to_outliers, "prefix": to_prefix, "images": images})
        assert self.entered is not None
        before_mlp = self.residual_sum.before_mlp(self.tower, self.entered, tokens)
        self.residual_sum.clear()  # so that it does not follow what is computed here
        self._look(before_mlp)
        self._look(tokens)

    def _look(self, tokens: Tensor | None) -> None:
        """At tokens (B, T, C) of the next place, or None if they are not to be had."""
        ratio = outlier = None
        if tokens is not None:
            prefix, patches = tokens[:, : self.tower.num_prefix].float(), tokens[:, self.patches].float()
            counted = ~ignored_patches(self.ignored, self.grid).to(patches.device)
            norms = patches.norm(dim=-1)  # (B, N)
            check_finite(norms, self.images)
            more, ratio, outlier = _look_at(prefix, patches, norms, self.grid, self.rule, counted)
            add(self.sums.places[len(self.ratios)], more)
        self.ratios.append(ratio)
        self.outlier.append(outlier)


class _ResidualSum(TorchFunctionMode):
    """Finds the residual stream between attention and MLP, which no module hands out.

    A block ends by adding to it what came from the MLP, through whatever LayerScale and norms. So it is the other
    summand of the first such sum, provided that this sum is what the block returns. It is not to be had of blocks that
    add attention and MLP at once, or that have a norm behind the sum, or where compiled code adds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.from_mlp: list[Tensor] = []  # all that was computed from the output of the second linear
        self.sum: tuple[Tensor, Tensor] | None = None  # and its summand that was not

    def start(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the second linear."""
        self.from_mlp.append(output)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        others = [arg for arg in args if not self._is_from_mlp(arg)]
        if len(others) < len(args) and isinstance(out, Tensor):
            self.from_mlp.append(out)
            if self.sum is None and func in (torch.add, Tensor.add) and len(others) == 1:
                (other,) = others
                if isinstance(other, Tensor) and other.shape == out.shape:  # no bias
                    self.sum = out, other
        return out

    def _is_from_mlp(self, value: Any) -> bool:
        values = value if isinstance(value, list | tuple) else (value,)
        return any(each is known for each in values for known in self.from_mlp)

    def before_mlp(self, tower: Tower, entered: Tensor, left: Tensor) -> Tensor | None:
        """The stream (B, T, C) between attention and MLP of a block that got and gave such tokens."""
        if self.sum is None:
            return None
        num_tokens = left.shape[1]  # test-time registers are behind
        total, before = (tower.batch_first(each)[:, :num_tokens] for each in self.sum)
        in_turn = torch.equal(total, left) and not torch.equal(before, entered)
        return before if in_turn else None


def _look_at(
    prefix: Tensor, patches: Tensor, norms: Tensor, grid: tuple[int, int], rule: OutlierRule, counted: Tensor
) -> tuple[Sums, Tensor, Tensor]:
    """Sums over a batch (B, P, C) and (B, N, C) at one place; and of each patch (B, N) the ratio, and if an outlier.

    `norms` (B, N) are those of the patches. Only those that are `counted` (N,) may be outliers.
    """
    median = norms.median(-1, keepdim=True).values  # (B, 1)
    ratio = norms / median
    outlier = (norms > rule.limit(norms)) & counted
    cosine = neighbour_cosine(patches, grid)
    at_outliers = patches[outlier]  # (n, C)
    exact = ratio.cpu().double()
    sums = {
        "images": torch.tensor(len(norms)),
        "patches": torch.tensor(norms.numel()),
        "median": median.sum(),
        "maximum": exact.amax(1).sum(),
        "histogram": exact.log().clamp(LOWEST, HIGHEST).histc(BINS, LOWEST, LOWEST + BINS * BIN),
        # Moments about 1, the median: the mean is near, so nothing cancels when they are made central.
        "moments": torch.stack([(exact - 1).pow(power).sum() for power in range(1, 5)]),
        "outliers": outlier.sum(),
        "outlier_ratio": ratio[outlier].sum(),
        "outlier_cosine": cosine[outlier].sum(),
        "normal_cosine": cosine[~outlier].sum(),
        "channels": at_outliers.sum(0),
        "channel_energy": at_outliers.square().sum(0),
        "prefix": (prefix.norm(dim=-1) / median).sum(0),
    }
    return sums, ratio, outlier


def neighbour_cosine(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean cosine similarity (B, N) of each of the patches (B, N, C) to those above, below, left and right of it."""
    unit = F.normalize(patches, dim=-1).unflatten(1, grid)
    across = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1)  # (B, rows, columns - 1)
    down = (unit[:, 1:] * unit[:, :-1]).sum(-1)  # (B, rows - 1, columns)

    def at_both_ends(across: Tensor, down: Tensor) -> Tensor:
        return F.pad(across, (1, 0)) + F.pad(across, (0, 1)) + F.pad(down, (0, 0, 1, 0)) + F.pad(down, (0, 0, 0, 1))

    count = at_both_ends(torch.ones_like(across), torch.ones_like(down))
    return (at_both_ends(across, down) / count.clamp(min=1)).flatten(1)


# From sums to figures -------------------------------------------------------------------------------------------------


def _residual(sums: Sums) -> Residual:
    if not all(value.isfinite().all() for value in sums.values()):
        raise ValueError("the norms of the tokens are not finite (or zero): run the model in float32 or bfloat16")
    images, patches, outliers = (float(sums[name]) for name in ("images", "patches", "outliers"))

    def mean(name: str, count: float) -> float | None:
        return float(sums[name]) / count if count else None

    return Residual(
        median_norm=float(sums["median"]) / images,
        quantiles=_quantiles(sums["histogram"]),
        max_over_median=float(sums["maximum"]) / images,
        kurtosis=_kurtosis(sums["moments"] / patches),
        outlier_fraction=outliers / patches,
        outlier_ratio=mean("outlier_ratio", outliers),
        outlier_cosine=mean("outlier_cosine", outliers),
        normal_cosine=mean("normal_cosine", patches - outliers),
        massive_channels=_massive_channels(sums["channels"].abs(), sums["channel_energy"]) if outliers else [],
        prefix_ratio=(sums["prefix"] / images).tolist(),
    )


def _quantiles(histogram: Tensor) -> list[float]:
    """The middle of the bin in which each of `QUANTILES` lies."""
    levels = torch.tensor(QUANTILES, dtype=torch.float64) * histogram.sum()
    index = torch.searchsorted(histogram.cumsum(0), levels)
    return (LOWEST + (index + 0.5) * BIN).exp().tolist()


def _kurtosis(moments: Tensor) -> float | None:
    """From the first four moments about any point."""
    first, second, third, fourth = moments.tolist()
    variance = second - first**2
    central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
    return central / variance**2 if variance > 0 else None


def _massive_channels(mean: Tensor, energy: Tensor) -> list[tuple[int, float]]:
    """From |sum| and sum of squares (C,) of each channel at the outliers."""
    values, channels = mean.topk(min(NUM_CHANNELS, len(mean)))
    share = energy / energy.sum()
    massive = channels[values > MASSIVE * mean.median()].tolist()
    return [(channel, float(share[channel])) for channel in massive]


def _blocks(residuals: Sequence[Residual | None], attention: Sequence[Sums]) -> list[BlockDiagnosis]:
    blocks = []
    for before, after, drawn in zip(residuals[1::2], residuals[2::2], attention, strict=True):
        assert after is not None
        blocks.append(
            BlockDiagnosis(
                after_attention=before,
                after_mlp=after,
                outlier_attention=float(drawn["outliers"] / drawn["images"]) if drawn else None,
                prefix_attention=(drawn["prefix"] / drawn["images"]).tolist() if drawn else None,
            )
        )
    return blocks


def _outliers(sums: Observations, blocks: Sequence[BlockDiagnosis], at: int | None) -> Outliers | None:
    """Those after block `at`, or after the one where they stand out most."""
    fraction = torch.tensor([block.after_mlp.outlier_fraction for block in blocks], dtype=torch.float64)
    candidates = fraction >= MIN_FRACTION
    if at is not None:
        candidates &= torch.arange(len(blocks)) == at
    if not candidates.any():
        return None
    excess = sums.excess[:, 2::2]  # (L, L), after blocks
    d = int(excess.diagonal().masked_fill(~candidates, -math.inf).argmax())
    path, peak = sums.excess[d, : 2 * d + 3], excess[d, d]
    onset = int((path >= HALF * peak).float().argmax())  # NaN is not
    faded = (excess[d, d + 1 :] < HALF * peak).nonzero()
    added = (path[2::2] - path[1::2]).sum() / peak  # by MLPs
    fixed_share, fixed_positions = _fixed_positions(sums, d)
    return Outliers(
        block=d,
        fraction=float(fraction[d]),
        onset_block=max(onset - 1, 0) // 2,
        onset_part=_part(onset, path),
        fade_block=d + 1 + int(faded[0]) if len(faded) else None,
        mlp_share=None if added.isnan() else float(added),
        fixed_share=fixed_share,
        fixed_positions=fixed_positions,
    )


def _part(place: int, excess: Tensor) -> Part:
    """What is in front of a place; `excess` is NaN at those where there is nothing to see."""
    if place == 0:
        return "embedding"
    if place % 2:
        return "attention"
    return "block" if excess[place - 1].isnan() else "MLP"


def _fixed_positions(sums: Observations, d: int) -> tuple[float | None, list[FixedPosition]]:
    """Share of the outliers after block d that lie where most images have one, and where that is.

    Of images of several sizes, those of the most frequent one are compared.
    """
    (_, columns), counts = max(sums.positions.items(), key=lambda item: float(item[1]["images"]))
    images, events = float(counts["images"]), counts["events"][d]  # (N,)
    if images < MIN_IMAGES or not events.any():
        return None, []
    is_fixed = events >= HALF * images
    positions = [
        FixedPosition(n // columns, n % columns, float(events[n]) / images, float(counts["embedding"][n]) / images)
        for n in is_fixed.nonzero().flatten().tolist()
    ]
    return float(events[is_fixed].sum() / events.sum()), positions


def _prefix_roles(blocks: Sequence[BlockDiagnosis]) -> list[PrefixRole]:
    roles = []
    for token in range(len(blocks[0].after_mlp.prefix_ratio)):
        ratios = [block.after_mlp.prefix_ratio[token] for block in blocks]
        drawn = [block.prefix_attention[token] for block in blocks if block.prefix_attention is not None]
        if max(ratios) >= HIGH_NORM:
            roles.append(PrefixRole(token, ratios.index(max(ratios)), max(ratios), max(drawn, default=None)))
    return roles
