"""The charts of a report, as figures for papers and as SVG for the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from testreg.report.maps import AFTER, BEFORE
from testreg.report.measure import Norms, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

THIRD, FOURTH = "#009e73", "#cc79a7"
INK, PAPER, GRID = "#1f2328", "#ffffff", "#d5dae0"
CSS = {
    INK: "currentColor",
    PAPER: "var(--page)",
    GRID: "var(--grid)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    THIRD: "var(--third)",
    FOURTH: "var(--fourth)",
}  # what the colours are in a page, which is light or dark


@dataclass(frozen=True)
class Chart:
    """A chart, how it is plotted, and what it shows in words for those who do not see it."""

    title: str
    words: str
    plot: Callable[[Axes, Report], None]


@dataclass(frozen=True)
class Svg:
    """A chart as a part of a page."""

    title: str
    words: str
    view_box: str
    markup: str
    """What is inside the <svg> element; matplotlib has escaped all text in it."""


def charts_of(report: Report) -> dict[str, list[Chart]]:
    """The charts of a report, by the name of the picture in which they stand side by side."""
    charts = {
        "norms": [
            Chart("Norms after each block", _norms_in_words(report), _plot_norms),
            Chart("Outlier patches after each block", _outliers_in_words(report), _plot_outliers),
        ],
        "histograms": [
            Chart(f"After block {block}", _histogram_in_words(report, block), partial(_plot_histogram, block=block))
            for block in report.norms_before.ratios
        ],
    }
    if report.curve:
        charts["curve"] = [
            Chart("What is left of the outliers", _curve_in_words(report, REMOVAL), _plot_removal),
            Chart("What it changes", _curve_in_words(report, CHANGE), _plot_change),
        ]
    return charts


def draw(charts: Sequence[Chart], report: Report) -> Figure:
    """A figure with the charts side by side."""
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
            axis.set_title(chart.title)
            chart.plot(axis, report)
    return drawn


def svg(chart: Chart, report: Report) -> Svg:
    """The chart with text that stays text, in the colours of the page."""
    from matplotlib import rc_context

    target = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw([chart], report).savefig(target, format="svg", transparent=True, metadata=metadata)
    found = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', target.getvalue(), re.DOTALL)
    assert found is not None
    view_box, markup = found.groups()
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)  # figure_1, axes_1: every chart has these
    for colour, variable in CSS.items():
        markup = markup.replace(colour, variable)
    return Svg(chart.title, chart.words, view_box, markup)


# Norms and outliers of each block -------------------------------------------------------------------------------------


def _sides(report: Report) -> list[tuple[str, str, Norms]]:
    return [("before", BEFORE, report.norms_before), ("after", AFTER, report.norms_after)]


def _plot_norms(axis: Axes, report: Report) -> None:
    for side, colour, norms in _sides(report):
        axis.plot(norms.largest, color=colour, marker="o", markersize=4, label=f"largest patch, {side}")
        axis.plot(norms.median, color=colour, linestyle="--", linewidth=1.2, label=f"median patch, {side}")
    if report.norms_after.registers is not None:
        axis.plot(report.norms_after.registers, color=THIRD, marker="s", markersize=4, linestyle=":", label="register")
    axis.set(yscale="log", xlabel="block", ylabel="token norm (mean over images)")
    _label_plainly(axis.yaxis)
    _label_whole_numbers(axis.xaxis)
    axis.legend()


def _norms_in_words(report: Report) -> str:
    said = [
        f"{side.capitalize()}, the largest patch norm peaks at {_peak(norms.largest.tolist())}, where the median is "
        f"{norms.median[norms.largest.argmax()]:.3g}."
        for side, _, norms in _sides(report)
    ]
    if report.norms_after.registers is not None:
        said.append(f"The register's norm peaks at {_peak(report.norms_after.registers.tolist())}.")
    return " ".join(said)


def _peak(values: Sequence[float], unit: str = "") -> str:
    highest = max(values)
    return f"{highest:.3g}{unit} after block {values.index(highest)}"


def _outlier_percentages(report: Report) -> dict[str, list[float]]:
    """Outliers in percent of the patches, after each block."""
    sides = {"before": report.before, "after": report.after}
    return {
        side: [100 * block.after_mlp.outlier_fraction for block in diagnosis.blocks]
        for side, diagnosis in sides.items()
    }


def _plot_outliers(axis: Axes, report: Report) -> None:
    for (side, values), colour in zip(_outlier_percentages(report).items(), (BEFORE, AFTER), strict=True):
        axis.plot(values, color=colour, marker="o", markersize=4, label=side)
    axis.set(xlabel="block", ylabel="outliers (% of patches)")
    axis.set_ylim(bottom=0)
    _label_whole_numbers(axis.xaxis)
    axis.legend()


def _outliers_in_words(report: Report) -> str:
    return " ".join(
        f"{side.capitalize()}, at most {_peak(values, ' % of the patches')}."
        if any(values)
        else f"{side.capitalize()}, none after any block."
        for side, values in _outlier_percentages(report).items()
    )


def _plot_histogram(axis: Axes, report: Report, *, block: int) -> None:
    ratios = torch.stack([norms.ratios[block].flatten() for _, _, norms in _sides(report)])
    low, high = float(ratios.amin().clamp(min=1e-3)), float(ratios.amax())
    bins = torch.logspace(math.log10(low / 1.01), math.log10(high * 1.01), 61).tolist()
    for values, (side, colour, _) in zip(ratios, _sides(report), strict=True):
        axis.hist(values.numpy(), bins=bins, color=colour, alpha=0.25)
        axis.hist(values.numpy(), bins=bins, color=colour, histtype="step", linewidth=1.5, label=side)
    axis.set(xscale="log", yscale="log", ylabel="patches")
    axis.set_xlabel("norm / median norm of the image's patches")
    _label_plainly(axis.xaxis)
    _label_plainly(axis.yaxis)
    axis.legend()


def _histogram_in_words(report: Report, block: int) -> str:
    said = [
        f"{side} from {float(norms.ratios[block].amin()):.2g} to {float(norms.ratios[block].amax()):.3g}"
        for side, _, norms in _sides(report)
    ]
    return f"Histogram of patch norms over the median norm of their image: {', '.join(said)}."


# The trade-off over the number of neurons -----------------------------------------------------------------------------

REMOVAL = {"remaining": "outliers, at the worst block", "excess": "excess norm"}
CHANGE = {"change_pooled": "pooled feature", "change_patches": "patch features"}
CURVES = ((THIRD, "o"), (FOURTH, "s"))  # colour and marker of the first and the second curve of a chart


def _plot_removal(axis: Axes, report: Report) -> None:
    axis.set(ylabel="left (fraction of before)")
    _plot_curves(axis, report, REMOVAL, "target")


def _plot_change(axis: Axes, report: Report) -> None:
    axis.set(ylabel="change (1 - cosine similarity)")
    _plot_curves(axis, report, CHANGE, "max_change")


def _plot_curves(axis: Axes, report: Report, labels: Mapping[str, str], limit: str) -> None:
    """Figures over the number of neurons, the chosen number ringed, and the line that was not to be crossed."""
    for (key, label), (colour, marker) in zip(labels.items(), CURVES, strict=True):
        if points := _points(report, key):
            axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)
        if {"neurons", key} <= report.choice.keys():
            _ring(axis, [report.choice["neurons"]], [report.choice[key]])
    if limit in report.limits:
        axis.axhline(report.limits[limit], color=INK, linestyle=":", linewidth=1.2, label=limit.replace("_", " "))
    if "neurons" in report.choice:
        _ring(axis, [], [], "chosen")
    axis.set_xlabel("register neurons")
    if min(point["neurons"] for point in report.curve) > 0:
        axis.set_xscale("log")
        _label_plainly(axis.xaxis)
    axis.legend()


def _points(report: Report, key: str) -> list[tuple[float, float]]:
    """One figure over the number of neurons."""
    return sorted((point["neurons"], point[key]) for point in report.curve if key in point)


def _ring(axis: Axes, x: Sequence[float], y: Sequence[float], label: str | None = None) -> None:
    axis.scatter(x, y, s=100, marker="o", facecolors="none", edgecolors=INK, linewidths=1.5, zorder=3, label=label)


def _curve_in_words(report: Report, labels: Mapping[str, str]) -> str:
    said = []
    for key, label in labels.items():
        if points := _points(report, key):
            (fewest, first), (most, last) = points[0], points[-1]
            said.append(f"{label} {first:.2g} at {fewest:g} and {last:.2g} at {most:g}")
    chosen = f" Chosen: {report.choice['neurons']:g}." if "neurons" in report.choice else ""
    return f"Over the number of register neurons: {'; '.join(said)}.{chosen}"


# Axes -----------------------------------------------------------------------------------------------------------------


def _label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis 1, 2, 5, 10, ...: powers of 10 say little where there are only a few decades."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    subs = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _label_whole_numbers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))
