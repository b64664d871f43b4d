"""Pictures of what a model does, without and with test-time registers: maps, and the charts of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from testreg.families import Tower, find_tower
from testreg.measure.attention import attention_to_patches, entropy
from testreg.measure.hooks import recorded_tokens
from testreg.measure.outliers import OutlierRule, token_norms
from testreg.register import disabled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from testreg.report.page import Report

BEFORE, AFTER, THIRD, FOURTH = "#d55e00", "#0072b2", "#009e73", "#cc79a7"  # for the colour-blind (Okabe and Ito)
INK, PAPER, GRID = "#1f2328", "#ffffff", "#d5dae0"
CSS = {
    INK: "currentColor",
    PAPER: "var(--page)",
    GRID: "var(--grid)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
}  # what they are in a page, which is light or dark

Chart = Callable[["Axes", "Report"], None]


@dataclass(frozen=True)
class Maps:
    """What a model does on images (B, 3, h, w) with a grid of rows x columns patches."""

    norms: Tensor
    """(B, rows, columns), of the patches after one block."""
    attention: Tensor | None
    """(B, rows, columns), from CLS in the last block, mean of the heads; None if it was not asked for."""
    features: Tensor
    """(B, rows, columns, C), the patches after the last block."""
    outlier_fraction: float
    max_over_median: float
    """Mean over the images of the largest norm over the median norm."""
    attention_entropy: float | None
    """Of CLS over the patches in the last block, in nats; mean over heads and images."""


def measure(
    tower: Tower, images: Tensor, block: int, limit: Tensor | None = None, *, attention: bool = True
) -> tuple[Maps, Tensor]:
    """Maps of a tower as it is, and the norm (B, 1) above which a patch counts as an outlier.

    Args:
        block: the block whose output norms are looked at.
        limit: an earlier result's limit, to count what is left of the outliers by the same measure.
        attention: False leaves it out, of towers whose attention cannot be observed.
    """
    with recorded_tokens(tower, -1) as last:
        norms = token_norms(tower, images)
    rows, columns = grid = tower.grid(images)
    patches = slice(tower.num_prefix, tower.num_prefix + rows * columns)
    norms = norms[block, :, patches]  # (B, N)
    limit = OutlierRule().limit(norms) if limit is None else limit
    drawn = attention_to_patches(tower, images) if attention else None  # (B, heads, N)
    maps = Maps(
        norms=norms.unflatten(1, grid).cpu(),
        attention=None if drawn is None else drawn.mean(1).unflatten(1, grid).cpu(),
        features=last[0][:, patches].float().unflatten(1, grid).cpu(),
        outlier_fraction=float((norms > limit).float().mean()),
        max_over_median=float((norms.amax(1) / norms.median(1).values).mean()),
        attention_entropy=None if drawn is None else float(entropy(drawn).mean()),
    )
    return maps, limit


def compare(model: nn.Module, images: Tensor, block: int = -1, *, attention: bool = True) -> tuple[Maps, Maps]:
    """Maps of a patched model without and with its registers."""
    tower = find_tower(model)
    with disabled(model):
        before, limit = measure(tower, images, block, attention=attention)
    after, _ = measure(tower, images, block, limit, attention=attention)
    return before, after


def table(before: Maps, after: Maps) -> str:
    """The figures of both, as text."""
    rows = [
        ("outlier patches", f"{before.outlier_fraction:.2%}", f"{after.outlier_fraction:.2%}"),
        ("max / median norm", f"{before.max_over_median:.2f}", f"{after.max_over_median:.2f}"),
    ]
    if before.attention_entropy is not None and after.attention_entropy is not None:
        rows.append(("attention entropy (nats)", f"{before.attention_entropy:.2f}", f"{after.attention_entropy:.2f}"))
    lines = [f"{'':26}{'before':>10}{'after':>10}"]
    return "\n".join(lines + [f"{name:26}{first:>10}{second:>10}" for name, first, second in rows])


def feature_colours(before: Maps, after: Maps) -> tuple[Tensor, Tensor]:
    """Features as colours in [0, 1], twice (B, rows, columns, 3): their first three principal components.

    The same feature has the same colour before and after. Components and range are those of the patches that are no
    outliers: these would take all colours for themselves.
    """
    sides = [maps.features.flatten(1, 2).double() for maps in (before, after)]  # (B, N, C)
    norms = [tokens.norm(dim=-1) for tokens in sides]
    normal = torch.cat([tokens[size <= OutlierRule().limit(size)] for tokens, size in zip(sides, norms, strict=True)])
    mean = normal.mean(0)
    _, vectors = torch.linalg.eigh((normal - mean).T @ (normal - mean))  # ascending
    axes = vectors[:, -3:].flip(1)  # (C, 3)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # whose sign is arbitrary
    range_of = torch.tensor([0.02, 0.98], dtype=torch.float64)
    low, high = ((normal - mean) @ axes).quantile(range_of, dim=0)
    first, second = (((tokens - mean) @ axes - low) / (high - low).clamp(min=1e-12) for tokens in sides)
    grid = before.features.shape[1:3]
    return first.clamp(0, 1).unflatten(1, grid), second.clamp(0, 1).unflatten(1, grid)


def photograph(image: Tensor) -> Tensor:
    """A preprocessed image (3, h, w) as one to look at, (h, w, 3) in [0, 1]: whatever its scale was."""
    image = image.float().cpu().permute(1, 2, 0)
    return (image - image.amin()) / (image.amax() - image.amin()).clamp(min=1e-6)


@dataclass(frozen=True)
class Panel:
    """One picture of an image."""

    what: str
    """"photograph", "norms", "attention" or "features"."""
    side: str
    """"before" or "after"; "" of the photograph."""
    pixels: Tensor
    """(h, w, 3), colours in [0, 1]."""
    largest: float | None
    """The value of the brightest colour."""


def panels(image: Tensor, i: int, before: Maps, after: Maps, colours: Sequence[Tensor]) -> list[Panel]:
    """The pictures of image i (3, h, w): the photograph, then each map before and after.

    Norms share a colour scale (logarithmic), so that before and after compare; attention maps have one each, since a
    single outlier would leave nothing else to be seen. `colours` are the `feature_colours` of all images.
    """
    sides = {"before": before, "after": after}
    logs = torch.stack([maps.norms[i].log() for maps in sides.values()])  # (2, rows, columns)
    made = [Panel("photograph", "", photograph(image), None)]
    for side, values in zip(sides, logs, strict=True):
        made.append(Panel("norms", side, _coloured(values, "viridis", logs), float(values.amax().exp())))
    for side, maps in sides.items():
        if maps.attention is not None:
            drawn = maps.attention[i]
            made.append(Panel("attention", side, _coloured(drawn, "inferno", drawn), float(drawn.amax())))
    for side, rgb in zip(sides, colours, strict=True):
        made.append(Panel("features", side, rgb[i], None))
    return made


def _coloured(values: Tensor, name: str, scale: Tensor) -> Tensor:
    """(h, w) -> (h, w, 3), by a colour map that spans the values of `scale`."""
    from matplotlib import colormaps

    share = (values - scale.amin()) / (scale.amax() - scale.amin()).clamp(min=1e-12)
    return torch.from_numpy(colormaps[name](share.numpy())[..., :3])


def figure(images: Tensor, before: Maps, after: Maps, title: str) -> Figure:
    """One row an image (B, 3, h, w): its photograph, and norms, attention and features before and after."""
    from matplotlib.figure import Figure

    colours = feature_colours(before, after)
    rows = [panels(image, i, before, after, colours) for i, image in enumerate(images)]
    page = Figure(figsize=(1.5 * len(rows[0]), 1.68 * len(rows) + 0.6), layout="constrained")
    axes = page.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis, panel in zip(axes[0], rows[0], strict=True):
        axis.set_title(f"{panel.what} {panel.side}", fontsize=9)
    for row, made in zip(axes, rows, strict=True):
        for axis, panel in zip(row, made, strict=True):
            _draw(axis, panel)
    page.suptitle(title, fontsize=10, parse_math=False)
    return page


def _draw(axis: Axes, panel: Panel) -> None:
    axis.imshow(panel.pixels.numpy(), interpolation="antialiased" if panel.what == "photograph" else "nearest")
    axis.set(xticks=[], yticks=[])
    if panel.largest is not None:
        axis.set_xlabel(f"max {panel.largest:.3g}", fontsize=8)
    for spine in axis.spines.values():
        spine.set_edgecolor({"before": BEFORE, "after": AFTER}.get(panel.side, "none"))


# Charts of a report ---------------------------------------------------------------------------------------------------


def _norm_chart(axis: Axes, report: Report) -> None:
    for norms, colour, side in ((report.norms_before, BEFORE, "before"), (report.norms_after, AFTER, "after")):
        axis.plot(norms.largest, color=colour, marker="o", markersize=4, label=f"largest patch, {side}")
        axis.plot(norms.median, color=colour, linestyle="--", linewidth=1.2, label=f"median patch, {side}")
    if report.norms_after.registers is not None:
        axis.plot(report.norms_after.registers, color=THIRD, marker="s", markersize=4, linestyle=":", label="register")
    axis.set(yscale="log", xlabel="block", ylabel="token norm (mean over images)", title="Norms after each block")
    _plain_log(axis.yaxis)
    _whole(axis.xaxis)
    axis.legend()


def _outlier_chart(axis: Axes, report: Report) -> None:
    for diagnosis, colour, side in ((report.before, BEFORE, "before"), (report.after, AFTER, "after")):
        fractions = [100 * block.after_mlp.outlier_fraction for block in diagnosis.blocks]
        axis.plot(fractions, color=colour, marker="o", markersize=4, label=side)
    axis.set(xlabel="block", ylabel="outliers (% of patches)", title="Outlier patches after each block")
    axis.set_ylim(bottom=0)
    _whole(axis.xaxis)
    axis.legend()


def _histogram(block: int) -> Chart:
    def chart(axis: Axes, report: Report) -> None:
        sides = [(report.norms_before, BEFORE, "before"), (report.norms_after, AFTER, "after")]
        ratios = torch.stack([norms.ratios[block].flatten() for norms, _, _ in sides])
        low, high = float(ratios.amin().clamp(min=1e-3)), float(ratios.amax())
        bins = torch.logspace(math.log10(low / 1.01), math.log10(high * 1.01), 61).tolist()
        for values, (_, colour, side) in zip(ratios, sides, strict=True):
            axis.hist(values.numpy(), bins=bins, color=colour, alpha=0.25)
            axis.hist(values.numpy(), bins=bins, color=colour, histtype="step", linewidth=1.5, label=side)
        axis.set(xscale="log", yscale="log", ylabel="patches", title=f"After block {block}")
        axis.set_xlabel("norm / median norm of the image's patches")
        _plain_log(axis.xaxis)
        _plain_log(axis.yaxis)
        axis.legend()

    return chart


def _removal_chart(axis: Axes, report: Report) -> None:
    _plot_curve(axis, report, "remaining", THIRD, "o", "outliers, at the worst block")
    _plot_curve(axis, report, "excess", FOURTH, "s", "excess norm")
    axis.set(ylabel="left (fraction of before)", title="What is left of the outliers")
    _finish_curve(axis, report, "target")


def _change_chart(axis: Axes, report: Report) -> None:
    _plot_curve(axis, report, "change_pooled", THIRD, "o", "pooled feature")
    _plot_curve(axis, report, "change_patches", FOURTH, "s", "patch features")
    axis.set(ylabel="change (1 - cosine similarity)", title="What it changes")
    _finish_curve(axis, report, "max_change")


def _plot_curve(axis: Axes, report: Report, key: str, colour: str, marker: str, label: str) -> None:
    """One figure over the number of neurons; the chosen number is ringed."""
    points = sorted((point["neurons"], point[key]) for point in report.curve if key in point)
    if points:
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
    if {"neurons", key} <= report.choice.keys():
        _ring(axis, [report.choice["neurons"]], [report.choice[key]])


def _ring(axis: Axes, x: Sequence[float], y: Sequence[float], label: str | None = None) -> None:
    axis.scatter(x, y, s=100, marker="o", facecolors="none", edgecolors=INK, linewidths=1.5, zorder=3, label=label)


def _finish_curve(axis: Axes, report: Report, limit: str) -> None:
    """Axes, and the line that the calibration was not to cross."""
    if limit in report.limits:
        label = limit.replace("_", " ")
        axis.axhline(report.limits[limit], color=INK, linestyle=":", linewidth=1.2, label=label)
    if "neurons" in report.choice:
        _ring(axis, [], [], "chosen")
    axis.set_xlabel("register neurons")
    if min(point["neurons"] for point in report.curve) > 0:
        axis.set_xscale("log")
        _plain_log(axis.xaxis)
    axis.legend()


def _plain_log(axis: Axis) -> None:
    """Ticks 1, 2, 5, 10, ... as they are: 10 to a power says little where a few decades are all."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _whole(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def charts_of(report: Report) -> dict[str, list[Chart]]:
    """By the name of the picture."""
    charts: dict[str, list[Chart]] = {
        "norms": [_norm_chart, _outlier_chart],
        "histograms": [_histogram(block) for block in report.norms_before.ratios],
    }
    if report.curve:
        charts["curve"] = [_removal_chart, _change_chart]
    return charts


def draw(charts: Sequence[Chart], report: Report) -> Figure:
    """Side by side."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "font.size": 10,
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "legend.edgecolor": "none",
        "legend.facecolor": PAPER,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
    }
    with rc_context(style):
        drawn = Figure(figsize=(4.5 * len(charts), 3.5), layout="constrained")
        for axis, chart in zip(drawn.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
            axis.set_axisbelow(True)
            chart(axis, report)
    return drawn
